"""Refuse, before anything is allocated, a run that its own plan says cannot fit, and name the nearest one that does."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from minitron_train.arch import Shape
from minitron_train.config import Config
from minitron_train.planning.estimate import WEIGHT_BYTES
from minitron_train.planning.hardware import GIB, can_shard_optimizer_here, cuda_here, memory_here
from minitron_train.planning.layouts import divides
from minitron_train.planning.memory import (
    Layout,
    distill_bytes,
    eval_bytes,
    export_bytes,
    repair_bytes,
    score_bytes,
    slice_bytes,
)
from minitron_train.planning.stages import (
    disk_bytes,
    export_weight_bytes,
    file_weight_bytes,
    least_tokens,
    repair_tokens,
    scoring_layout,
)
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World

# parts of planning.stages.disk_bytes
DISK_PARTS = {"pretrain": "checkpoints", "prune": "pruned", "distill": "checkpoints", "export": "student"}
RUNS = {"pretrain": "pretrain/train", "distill": "train"}  # folders of checkpoints that a run goes on with
MORE_GPUS = "use more GPUs with a larger parallel.tensor_model_parallel_size"
ALONE = "run it alone, on a machine with more memory"
MORE = {
    "pretrain": MORE_GPUS,
    "score": MORE_GPUS,
    "prune": ALONE,
    "distill": MORE_GPUS,
    "export": ALONE,
    "eval": MORE_GPUS,
}
OVERRIDE = "plan.check=false overrides"


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a stage: what would have to be set, and the memory of one process."""

    settings: tuple[str, ...]
    needed_bytes: int


def check_fits(config: Config, stage: str, teacher: Shape, student: Shape, world: World, folder: Path) -> None:
    """Refuse `stage` when memory or disk is too small; does nothing with plan.check=false.

    Args:
        stage: pretrain, score, prune, distill, export or eval. Pretrain, export and eval have one shape, given twice.
        folder: output_dir, whose disk is looked at; it need not exist.

    Raises:
        UserError: what is needed, what is there, and the nearest settings that fit.
    """
    if not config.plan.check:
        return
    if stage in OPTIONS:
        cuda = stage != "export" and cuda_here()
        left = memory_here(cuda) // (1 if cuda or stage == "export" else world.local_size)
        options = list(OPTIONS[stage](config, teacher, student, world, cuda))
        as_configured = min((option.needed_bytes for option in options if not option.settings), default=0)
        refuse_memory(stage, as_configured, left, options)
    if stage in DISK_PARTS:
        refuse_disk(stage, disk_bytes(config, teacher, student)[DISK_PARTS[stage]], folder)


def refuse_memory(stage: str, needed: int, left: int, others: list[Option]) -> None:
    """One line when `needed` is more than is `left`: the option that changes least and fits, or the smallest one."""
    if needed <= left:
        return
    what = f"{stage}: needs {needed / GIB:.1f} GiB of memory per process, {left / GIB:.1f} GiB are there"
    fitting = [option for option in others if option.needed_bytes <= left]
    if fitting:
        nearest = min(fitting, key=lambda option: (len(option.settings), -option.needed_bytes))
        raise UserError(f"{what}; {' '.join(nearest.settings)} needs {nearest.needed_bytes / GIB:.1f} GiB ({OVERRIDE})")
    smallest = min([needed, *(option.needed_bytes for option in others)])
    raise UserError(
        f"{what}, and no layout on these processes needs less than {smallest / GIB:.1f}; {MORE[stage]} ({OVERRIDE})"
    )


def refuse_disk(stage: str, needed: int, folder: Path) -> None:
    """One line when the disk of `folder` is too small; what an earlier run of the stage left there may be reused."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if stage in RUNS:
        free += sum(file.stat().st_size for file in (folder / RUNS[stage]).rglob("*") if file.is_file())
    if needed > free:
        remedy = "free space, set output_dir to another disk" + (", or lower checkpoint.keep" if stage in RUNS else "")
        raise UserError(
            f"{stage}: needs {needed / GIB:.3g} GiB of disk in {folder}, {free / GIB:.3g} GiB are free; {remedy} ({OVERRIDE})"
        )


def reserved_bytes(config: Config, cuda: bool) -> int:
    """What a GPU's runtime takes; 0 leaves it to what was measured on CPUs."""
    return int(config.cluster.reserved_gib * GIB) if cuda else 0


def pretrain_options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """As for distilling, without a teacher."""
    return distill_options(config, None, student, world, cuda)


def distill_options(
    config: Config, teacher: Shape | None, student: Shape, world: World, cuda: bool
) -> Iterator[Option]:
    """The configured layout first, then the others that the same processes could take."""
    train, tp = config.train, config.parallel.tensor_model_parallel_size
    now = Layout(
        tp=tp,
        dp=max(world.size // tp, 1),
        micro_batch_size=train.micro_batch_size,
        seq_length=train.seq_length,
        weight_bytes=WEIGHT_BYTES[train.precision],
        teacher_weight_bytes=WEIGHT_BYTES[config.distill.teacher_precision or train.precision],
        runtime_bytes=reserved_bytes(config, cuda),
        logit_memory_fraction=config.distill.logit_memory_fraction,
        recompute=train.recompute.name,
        sequence_parallel=config.parallel.sequence_parallel and tp > 1,
        sharded_optimizer=train.shards_optimizer(possible=cuda and can_shard_optimizer_here()),
        cuda=cuda,
    )
    yield Option((), distill_bytes(teacher, student, now)["total"])
    for size in tp_sizes(world, *filter(None, (teacher, student))):
        for micro in (micro for micro in range(1, train.micro_batch_size + 1) if train.micro_batch_size % micro == 0):
            for recompute in ("none", "selective", "full"):
                other = replace(now, tp=size, dp=world.size // size, micro_batch_size=micro, recompute=recompute)
                names = {
                    "parallel.tensor_model_parallel_size": (tp, size),
                    "train.micro_batch_size": (train.micro_batch_size, micro),
                    "train.recompute": (train.recompute.name, recompute),
                }
                yield Option(changed(names), distill_bytes(teacher, student, other)["total"])


def tp_sizes(world: World, *shapes: Shape) -> list[int]:
    """Tensor-parallel sizes that these processes and shapes allow."""
    sizes = range(1, world.size + 1)
    return [size for size in sizes if world.size % size == 0 and all(divides(shape, size) for shape in shapes)]


def eval_options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The configured layout first, then other tensor-parallel sizes and fewer sequences at once."""
    settings, tp = config.eval, config.parallel.tensor_model_parallel_size
    weight_bytes = WEIGHT_BYTES[settings.precision_on(cuda)]
    others = product(tp_sizes(world, student), (settings.validation_batch_size, 1))
    for size, batch in [(tp, settings.validation_batch_size), *others]:
        layout = Layout(
            tp=size,
            micro_batch_size=batch,
            seq_length=config.train.seq_length,
            weight_bytes=weight_bytes,
            teacher_weight_bytes=weight_bytes,
            runtime_bytes=reserved_bytes(config, cuda),
            cuda=cuda,
        )
        names = {
            "parallel.tensor_model_parallel_size": (tp, size),
            "eval.validation_batch_size": (settings.validation_batch_size, batch),
        }
        yield Option(changed(names), eval_bytes(student, layout)["total"])


def score_options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The configured way of scoring first, then streamed and in smaller pieces."""
    calibration = config.calibration
    tokens = calibration.num_samples * calibration.seq_length
    layout = scoring_layout(config, cuda=cuda, runtime_bytes=reserved_bytes(config, cuda))
    micro_sizes = {calibration.micro_batch_size, max(calibration.micro_batch_size // 4, 1), 1}
    ways = [
        (bool(calibration.streamed), calibration.micro_batch_size, calibration.chunk_tokens),
        *(
            (on, micro, chunk)
            for on in (False, True)
            for micro in micro_sizes
            for chunk in (calibration.chunk_tokens, 16384)
        ),
    ]
    for streamed, micro, chunk in ways:
        at_once = replace(layout, micro_batch_size=micro)
        names = {
            "calibration.streamed": (streamed if calibration.streamed is None else calibration.streamed, streamed),
            "calibration.micro_batch_size": (calibration.micro_batch_size, micro),
            "calibration.chunk_tokens": (calibration.chunk_tokens, chunk),
        }
        parts = score_bytes(teacher, at_once, chunk_tokens=min(chunk, tokens), streamed=streamed)
        yield Option(changed(names), parts["total"])


def prune_options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """Rotation and repair as configured, on fewer tokens, and neither of them."""
    calibration, prune, tokens = config.calibration, config.prune, repair_tokens(config)
    if not (prune.rotate or prune.repairs):
        return
    layout = scoring_layout(config, cuda=cuda, runtime_bytes=reserved_bytes(config, cuda))
    fewer = [tokens // part for part in (2, 4, 8) if tokens // part >= least_tokens(student)]
    for chosen, micro in product((tokens, *fewer), (calibration.micro_batch_size, 1)):
        at_once = replace(layout, micro_batch_size=micro)
        names = {
            "prune.repair_tokens": (tokens, chosen),
            "calibration.micro_batch_size": (calibration.micro_batch_size, micro),
        }
        parts = repair_bytes(teacher, student, prune, at_once, tokens=-(-chosen // world.size))
        yield Option(changed(names), parts["total"])
    plain = slice_bytes(teacher, file_weight_bytes(config))["total"]
    yield Option(("prune.rotate=false", "prune.refit=none", "prune.norm_scale=false"), plain)


def changed(names: Mapping[str, tuple[object, object]]) -> tuple[str, ...]:
    """key=value of every setting that differs."""
    return tuple(f"{key}={str(new).lower()}" for key, (old, new) in names.items() if old != new)


def export_options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The one way: a single process, a shard at a time."""
    yield Option((), export_bytes(student, export_weight_bytes(config))["total"])


OPTIONS = {
    "pretrain": pretrain_options,
    "score": score_options,
    "prune": prune_options,
    "distill": distill_options,
    "export": export_options,
    "eval": eval_options,
}
