"""What precision=auto means: bf16 where this machine multiplies it faster than fp32, and fp32 elsewhere."""

import functools
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minitron_train.config import Config, Precision
from minitron_train.planning.hardware import cuda_here
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError

if TYPE_CHECKING:
    from minitron_train.parallel.groups import Groups

LEAST_GAIN = 1.3  # with less, the conversions of a step cost what its products gain
PRODUCT_SIZE = 512
REPEATS = 7
VARIABLE = "MINITRON_AUTO_PRECISION"  # fp32 or bf16: replaces the measurement


@dataclass(frozen=True, slots=True)
class Choice:
    """What auto means, and why."""

    precision: Precision
    reason: str


def settled(asked: Precision, *, cuda: bool) -> Precision:
    """What `asked` is on this machine; the choice for auto is logged."""
    if asked is not Precision.auto:
        return asked
    choice = fastest(cuda)
    announce(choice)
    return choice.precision


def agreed(asked: Precision, groups: "Groups") -> Precision:
    """The same on every rank, as the first one measures it; collective."""
    if asked is not Precision.auto:
        return asked
    return groups.on_rank0(lambda: settled(asked, cuda=groups.device.type == "cuda"))


def concrete(config: Config) -> Config:
    """Replace every `auto` by this machine's choice, for estimates."""
    asked = [section.precision for section in (config.train, config.calibration, config.eval, config.speed)]
    is_auto = Precision.auto in (*asked, config.distill.teacher_precision)
    return with_choice(config, fastest(cuda_here()).precision) if is_auto else config


def recorded(asked: Precision) -> Precision | None:
    """The setting as a stage's record holds it: None for auto, so that a finished stage is valid on every machine."""
    return None if asked is Precision.auto else asked


def with_choice(config: Config, choice: Precision) -> Config:
    """Replace every `auto` by `choice`."""
    sections = {name: getattr(config, name) for name in ("train", "calibration", "eval", "speed")}
    auto = {name: section for name, section in sections.items() if section.precision is Precision.auto}
    changed = {name: replace(section, precision=choice) for name, section in auto.items()}
    if config.distill.teacher_precision is Precision.auto:
        changed["distill"] = replace(config.distill, teacher_precision=choice)
    return replace(config, **changed)


@functools.cache
def announce(choice: Choice) -> None:
    """Log the choice, once per process."""
    say(f"precision auto: {choice.precision}, {choice.reason}")


def fastest(cuda: bool) -> Choice:
    """Choose for this machine. A CPU is measured, once per process, in a fraction of a second.

    Raises:
        UserError: the environment variable names no precision.
    """
    if given := os.environ.get(VARIABLE):
        if given not in (Precision.fp32, Precision.bf16):
            raise UserError(f"{VARIABLE}={given}: must be fp32 or bf16; correct it, or unset it")
        return Choice(Precision(given), f"as {VARIABLE} says")
    return fastest_on_gpu() if cuda else fastest_on_cpu()


def fastest_on_gpu() -> Choice:
    """Choose bf16 on every GPU that multiplies it (compute capability 8.0 or later)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return Choice(Precision.fp32, "since this GPU has no bf16 units")
    return Choice(Precision.bf16, "the default on GPUs")


@functools.cache
def fastest_on_cpu() -> Choice:
    """Measure how much faster this CPU multiplies in bf16 than in fp32."""
    gain = bf16_gain()
    if gain < LEAST_GAIN:
        return Choice(Precision.fp32, f"since this CPU multiplies bf16 {gain:.1f} times as fast")
    return Choice(Precision.bf16, f"which this CPU multiplies {gain:.1f} times as fast as fp32")


def bf16_gain() -> float:
    """Time fp32 and bf16 products of square matrices in turn; the ratio of their best times."""
    import torch

    best: dict[torch.dtype, float] = {}
    for _ in range(REPEATS):
        for dtype in (torch.float32, torch.bfloat16):
            left, right, out = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype) for _ in range(3))
            start_s = time.perf_counter()
            torch.mm(left, right, out=out)
            best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - start_s)
    return best[torch.float32] / best[torch.bfloat16]
