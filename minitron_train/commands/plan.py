"""plan: parameters, memory, FLOPs and hours of a recipe. Nothing is run."""

from minitron_train.commands.command import SCORING, Command
from minitron_train.commands.workspace import Workspace, shape_of_recipe
from minitron_train.runtime.console import say


def plan(ws: Workspace) -> None:
    """Estimate what the recipe costs, and write plan.json."""
    from minitron_train.planning import format_plan, make_plan

    if ws.world.is_first:
        shape_of_recipe(ws.config)
        ws.teacher_shape.check_length(ws.config.train.seq_length, "train.seq_length", "teacher")
        say(format_plan(make_plan(ws.config, ws.teacher_shape, ws.student_shape, ws.folder / "plan.json")))


COMMAND = Command(
    name="plan",
    summary="estimate parameters, memory, FLOPs and hours; run nothing else",
    reads="the configuration",
    writes="plan.json",
    run=plan,
    per_member=False,
    sections=("model", "teacher", "student", "cluster", *SCORING, "distill", "train", "checkpoint"),
)
