"""teach: write what the teacher says about the training stream, so that `distill` needs no teacher in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands.command import Command, Job
from minitron_train.commands.teacher_cache import cache_folder, teaching_stage
from minitron_train.commands.training import training_text
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, LossKind, TeachKind
from minitron_train.planning.check import MORE_GPUS, Needs, Option, changed, reserved_bytes, tp_sizes
from minitron_train.planning.estimate import configured_layout
from minitron_train.planning.memory import teach_bytes
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World


def teach(ws: Workspace) -> None:
    """Write the teacher cache; an interrupted run resumes."""
    from minitron_train.train.teach import teach as write_cache

    check(ws.config)
    ws.check_teacher_is_there()
    shape = ws.teacher_shape
    shape.check_parallel(ws.config.parallel.tensor_model_parallel_size, "teacher")

    target = cache_folder(ws)

    def work(folder: Path) -> Mapping[str, Any]:
        ws.check_fits(COMMAND.name, NEEDS, shape, folder=target)
        return write_cache(ws.config, ws.groups, teacher=ws.teacher_folder, folder=folder)

    if ws.config.force and not ws.config.dry_run:  # refuse this run before it replaces an earlier cache
        ws.check_fits(COMMAND.name, NEEDS, shape, folder=target)
    ws.run(teaching_stage(ws), work)


def check(config: Config) -> None:
    """Refuse to draw samples for a loss that cannot use them.

    Raises:
        UserError: names the loss.
    """
    distill = config.distill
    if distill.hidden_layers:
        raise UserError("distill.hidden_layers: needs the teacher's inner layers, which no cache holds; leave it out")
    if config.teach.kind is TeachKind.samples and (distill.loss is not LossKind.forward_kl or distill.loss_function):
        loss = distill.loss_function or distill.loss.value
        raise UserError(f"teach.kind=samples: serves distill.loss=forward_kl only, not {loss}; use teach.kind=hidden")


def options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The configured layout first, then other tensor-parallel sizes and smaller micro-batches; without pipeline stages."""
    tp, size = config.parallel.tensor_model_parallel_size, config.train.micro_batch_size
    now = configured_layout(config, num_ranks=world.size, cuda=cuda, runtime_bytes=reserved_bytes(config, cuda))
    now = replace(now, pp=1, dp=max(world.size // tp, 1))
    yield Option((), teach_bytes(teacher, now)["total"])
    for other_tp in tp_sizes(world, 1, teacher):
        for micro in (micro for micro in range(1, size + 1) if size % micro == 0):
            layout = replace(now, tp=other_tp, dp=world.size // other_tp, micro_batch_size=micro)
            names = {
                "parallel.tensor_model_parallel_size": (tp, other_tp),
                "train.micro_batch_size": (size, micro),
            }
            yield Option(changed(names), teach_bytes(teacher, layout)["total"])


NEEDS = Needs(
    options=options,
    remedy=MORE_GPUS,
    disk="teacher_cache",
    replaces="",
    disk_remedy="free space, set teacher.cache to a folder on another disk, or lower teach.draws or teach.num_tokens",
)
COMMAND = Command(
    name="teach",
    summary="write the teacher's predictions for the training stream, for distill without a teacher in memory",
    reads="teacher/, text",
    writes="teacher_cache/",
    run=teach,
    sections=("teacher", "teach", "distill", "data", "train", "parallel", "plan"),
    in_chain=lambda config: config.teacher.cache is not None,
    check=check,
    text=training_text,
    needs_teacher=True,
    needs=NEEDS,
    job=Job(gpus=True, resumable=True),
)
