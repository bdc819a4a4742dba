"""The members of a model family: the configuration, the folders and the shape of each."""

from dataclasses import replace
from pathlib import Path

from minitron_train.arch import Shape
from minitron_train.arch.rules import check_rules
from minitron_train.commands.command import Command
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, ModelConfig, TeacherConfig, is_family, origins, with_member
from minitron_train.config.members import ORIGINAL
from minitron_train.planning.counts import parameters
from minitron_train.pruning.target import check_request
from minitron_train.runtime.errors import UserError
from minitron_train.stages.layout import STUDENT, TEACHER


def member_config(config: Config, name: str) -> Config:
    """The configuration of one member: its settings, its folder, and the folders of the models that it comes from.

    Args:
        config: of the whole family.
    """
    from minitron_train.commands.overrides import expand_paths  # loads Hydra

    member, root = with_member(config, name), Path(config.output_dir)
    expand_paths(member)
    source, teacher = origins(config)[name]

    def folder(origin: str) -> str:
        original = config.teacher.path or str(root / TEACHER)
        return original if origin == ORIGINAL else str(root / origin / STUDENT)

    if teacher != ORIGINAL:  # of the recipe's own teacher nothing holds for this one
        member = replace(member, teacher=TeacherConfig(path=folder(teacher)), model=ModelConfig())
    if source != teacher:
        member = replace(member, student=replace(member.student, pruned_from=folder(source)))
    return replace(member, output_dir=str(root / name))


def settled(command: Command, config: Config) -> Config:
    """The configuration that a command runs with: in a family that of the chosen member, if the command works on one.

    Raises:
        UserError: no member was chosen.
    """
    if not is_family(config) or not command.per_member:
        return config
    if config.member is None:
        raise UserError(
            f"member is not set: {command.name} works on one of {', '.join(config.members)}; "
            "add member=NAME, or run all with the command `run`"
        )
    return member_config(config, config.member)


def family_shapes(ws: Workspace) -> dict[str, Shape]:
    """The shapes of the teacher and of every member, by name, without the folders of the members.

    Raises:
        UserError: a member is larger than the model that it is pruned from or taught by, or breaks another rule of shapes.
    """
    tp = ws.config.parallel.tensor_model_parallel_size
    ws.teacher_shape.check_parallel(tp, "teacher")
    found = {ORIGINAL: ws.teacher_shape}
    for name, (source, teacher) in origins(ws.config).items():
        try:
            member = with_member(ws.config, name)
            found[name] = found[source].smaller(member.prune.drop_layers, **member.student.sizes())
            check_rules(found[name], "student")
            check_request(found[source], found[name], member.prune, member.calibration)
            found[name].check_parallel(tp, "student")
        except UserError as error:
            raise UserError(f"member {name}, pruned from {source}: {error}") from error
        own, taught = (parameters(found[model])["parameters"] for model in (name, teacher))
        if own > taught:
            raise UserError(
                f"members.{name}.taught_by={teacher}: the student is larger, {own:,} parameters against {taught:,}; "
                "choose a larger teacher"
            )
    return found
