"""plan: parameters, memory, FLOPs and hours of a recipe. Nothing is run."""

from dataclasses import replace
from typing import Any

from minitron_train.commands.command import SCORING, Command
from minitron_train.commands.members import family_shapes, member_config
from minitron_train.commands.workspace import Workspace, shape_of_recipe
from minitron_train.config import is_family, origins
from minitron_train.runtime.console import say


def plan(ws: Workspace) -> None:
    """Estimate what the recipe costs, and write plan.json."""
    from minitron_train.planning import format_plan
    from minitron_train.runtime.files import atomic_write_json

    if ws.world.is_first:
        shape_of_recipe(ws.config)
        found, member = planned(ws), ws.config.member or ""
        atomic_write_json(ws.folder / member / "plan.json", found)
        say(format_plan(found))


def planned(ws: Workspace) -> dict[str, Any]:
    """The plan of the recipe; of a model family that of all members, or of the chosen one."""
    from minitron_train.planning import Member, family_plan, make_plan

    ws.teacher_shape.check_length(ws.config.train.seq_length, "train.seq_length", "teacher")
    if not is_family(ws.config):
        return make_plan(ws.config, ws.teacher_shape, ws.student_shape, source=ws.source_shape)
    shapes, members = family_shapes(ws), {}
    for name, (source, teacher) in origins(ws.config).items():
        config = member_config(ws.config, name)
        alone = replace(config, plan=replace(config.plan, pretraining_tokens=None))  # the family compares as a whole
        if ws.config.member in (None, name):
            own = make_plan(alone, shapes[teacher], shapes[name], source=shapes[source])
            members[name] = Member(config=config, shape=shapes[name], pruned_from=source, taught_by=teacher, plan=own)
    return dict(members[ws.config.member].plan) if ws.config.member else family_plan(ws.config, shapes, members)


COMMAND = Command(
    name="plan",
    summary="estimate parameters, memory, FLOPs and hours; run nothing else",
    reads="the configuration",
    writes="plan.json",
    run=plan,
    per_member=False,
    sections=("model", "teacher", "student", "cluster", *SCORING, "teach", "distill", "train", "checkpoint"),
)
