"""Refuse, before anything is allocated, a run that its own plan says cannot fit, and name the nearest one that does."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_train.arch import Shape
from minitron_train.config import Config
from minitron_train.planning.hardware import GIB, cuda_here, memory_here
from minitron_train.planning.layouts import divides
from minitron_train.planning.precision import concrete
from minitron_train.planning.stages import disk_bytes
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World

FEWER_CHECKPOINTS = "free space, set output_dir to another disk, or lower checkpoint.keep"
MORE_GPUS = "use more GPUs with a larger parallel.tensor_model_parallel_size"
OVERRIDE = "plan.check=false overrides"


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a command: what would have to be set, and the memory of one process."""

    settings: tuple[str, ...]
    needed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a command takes from the machine, as far as settings and shapes tell.

    Attributes:
        options: (config, teacher, student, world, cuda) -> ways to run it, the configured one first.
        remedy: what the user can do when no option fits.
        disk: the part of planning.stages.disk_bytes that it writes; None: the disk is not checked.
        replaces: the folder below the checked one whose files it replaces or resumes; their bytes count as free.
        disk_remedy: what the user can do when the disk is too small.
        in_one_process: whether one process does the work on the CPU, however many were started.
    """

    options: Callable[[Config, Shape, Shape, World, bool], Iterator[Option]]
    remedy: str
    disk: str | None = None
    replaces: str | None = None
    disk_remedy: str = "free space, or set output_dir to another disk"
    in_one_process: bool = False


def check_fits(
    config: Config, name: str, needs: Needs, teacher: Shape, student: Shape, world: World, folder: Path
) -> None:
    """Refuse command `name` when memory or disk is too small; does nothing with plan.check=false.

    Args:
        teacher, student: both shapes; a command with one model gives it twice.
        folder: output_dir, or what the command writes outside of it; its disk is looked at, and it need not exist.

    Raises:
        UserError: what is needed, what is available, and the nearest settings that fit.
    """
    if not config.plan.check:
        return
    config, cuda = concrete(config), not needs.in_one_process and cuda_here()
    left = memory_here(cuda) // (1 if cuda or needs.in_one_process else world.local_size)
    options = list(needs.options(config, teacher, student, world, cuda))
    as_configured = min((option.needed_bytes for option in options if not option.settings), default=0)
    refuse_memory(name, as_configured, left, options, needs.remedy)
    refuse_disk(config, name, needs, teacher, student, folder)


def refuse_memory(name: str, needed: int, left: int, others: list[Option], remedy: str) -> None:
    """One line when `needed` is more than is `left`: the option that changes least and fits, or the smallest one."""
    if needed <= left:
        return
    what = f"{name}: needs {needed / GIB:.1f} GiB of memory per process, {left / GIB:.1f} GiB are available"
    fitting = [option for option in others if option.needed_bytes <= left]
    if fitting:
        nearest = min(fitting, key=lambda option: (len(option.settings), -option.needed_bytes))
        raise UserError(f"{what}; {' '.join(nearest.settings)} needs {nearest.needed_bytes / GIB:.1f} GiB ({OVERRIDE})")
    smallest = min([needed, *(option.needed_bytes for option in others)])
    raise UserError(
        f"{what}, and no layout on these processes needs less than {smallest / GIB:.1f}; {remedy} ({OVERRIDE})"
    )


def refuse_disk(config: Config, name: str, needs: Needs, teacher: Shape, student: Shape, folder: Path) -> None:
    """One line when the disk of `folder` is too small; what an earlier run of the command left there may be replaced."""
    if needs.disk is None:
        return
    needed = disk_bytes(config, teacher, student)[needs.disk]
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needs.replaces is not None:
        free += sum(file.stat().st_size for file in (folder / needs.replaces).rglob("*") if file.is_file())
    if needed > free:
        raise UserError(
            f"{name}: needs {needed / GIB:.3g} GiB of disk in {folder}, {free / GIB:.3g} GiB are free; "
            f"{needs.disk_remedy} ({OVERRIDE})"
        )


def reserved_bytes(config: Config, cuda: bool) -> int:
    """What a GPU's runtime takes; 0 leaves it to what was measured on CPUs."""
    return int(config.cluster.reserved_gib * GIB) if cuda else 0


def tp_sizes(world: World, num_stages: int, *shapes: Shape) -> list[int]:
    """Tensor-parallel sizes that these processes, divided into pipeline stages, and shapes allow."""
    sizes = range(1, world.size // num_stages + 1)
    return [
        size
        for size in sizes
        if world.size % (size * num_stages) == 0 and all(divides(shape, size) for shape in shapes)
    ]


def changed(names: Mapping[str, tuple[object, object]]) -> tuple[str, ...]:
    """key=value of every setting that differs."""
    return tuple(f"{key}={str(new).lower()}" for key, (old, new) in names.items() if old != new)
