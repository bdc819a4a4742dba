"""Parallel layouts of a cluster: memory and speed of each, sorted so that the recommended one is first."""

from collections.abc import Iterator
from dataclasses import dataclass

from minitron_train.arch import Shape
from minitron_train.arch.shape import SPLIT_SIZES
from minitron_train.planning.hardware import Hardware
from minitron_train.planning.memory import Layout, distill_bytes
from minitron_train.planning.timing import StepTime, step_time

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
NUMBERS_OF_STAGES = (2, 4, 8, 16, 32, 64)


def candidates(
    teacher: Shape, student: Shape, machine: Hardware, base: Layout, global_batch_size: int, num_stages: int = 1
) -> Iterator[Layout]:
    """Yield every valid combination of tensor- and expert-parallel size (within a node), micro-batch size, recompute setting.

    Args:
        num_stages: pipeline stages of each.
    """
    for tp, ep in parallel_sizes(machine.gpus_per_node, teacher, student):
        dp, rest = divmod(machine.num_gpus, tp * num_stages)
        if rest or not dp or dp % ep or num_stages > min(teacher.num_layers, student.num_layers):
            continue
        for micro in MICRO_BATCH_SIZES:
            if not shares(global_batch_size, dp, micro):
                continue
            for recompute in ("none", "selective", "full"):
                yield Layout(
                    tp=tp,
                    dp=dp,
                    ep=ep,
                    pp=num_stages,
                    micro_batch_size=micro,
                    seq_length=base.seq_length,
                    weight_bytes=base.weight_bytes,
                    teacher_weight_bytes=base.teacher_weight_bytes,
                    global_batch_size=global_batch_size,
                    runtime_bytes=base.runtime_bytes,
                    logit_memory_fraction=base.logit_memory_fraction,
                    logit_passes=base.logit_passes,
                    cached=base.cached,
                    recompute=recompute,
                    sequence_parallel=tp > 1 and machine.cuda,
                    sharded_optimizer=base.sharded_optimizer,
                    cuda=machine.cuda,
                )


def parallel_sizes(num_ranks: int, *shapes: Shape) -> Iterator[tuple[int, int]]:
    """Yield the tensor- and expert-parallel sizes that divide `num_ranks` ranks together, and all shapes."""
    for tp in range(1, num_ranks + 1):
        if num_ranks % tp == 0 and all(divides(shape, tp) for shape in shapes):
            sizes = (ep for ep in range(1, num_ranks // tp + 1) if num_ranks // tp % ep == 0)
            yield from ((tp, ep) for ep in sizes if all(splits_experts(shape, ep) for shape in shapes))


def splits_experts(shape: Shape, ep: int) -> bool:
    """Whether the expert-parallel size `ep` is possible (the rule of Shape.check_experts)."""
    return ep == 1 or (shape.num_moe_experts > 0 and shape.num_moe_experts % ep == 0)


def divides(shape: Shape, tp: int) -> bool:
    """Whether the tensor-parallel size `tp` divides the shape evenly (the rule of Shape.check_parallel)."""
    return all(getattr(shape, size) % tp == 0 for size in SPLIT_SIZES) and shape.real_rows(tp - 1, tp) > 0


def shares(global_batch_size: int, dp: int, micro_batch_size: int) -> bool:
    """Whether all data-parallel ranks get the same whole number of micro-batches."""
    return global_batch_size % (dp * micro_batch_size) == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A layout with its memory and its speed."""

    layout: Layout
    memory: dict[str, int]
    step: StepTime
    fits: bool


def evaluate(
    teacher: Shape | None, student: Shape, machine: Hardware, layout: Layout, global_batch_size: int
) -> Choice:
    """Estimate memory and step time of a layout, for distillation, or for pretraining if `teacher` is None."""
    memory = distill_bytes(teacher, student, layout)
    step = step_time(teacher, student, machine, layout, global_batch_size)
    return Choice(layout=layout, memory=memory, step=step, fits=memory["total"] <= machine.memory_bytes)


def all_choices(
    teacher: Shape, student: Shape, machine: Hardware, base: Layout, global_batch_size: int
) -> list[Choice]:
    """Return all layouts of the cluster: first those that fit, fastest first, then the others by memory.

    Pipeline stages are tried where they are configured, or where memory is too small for every valid layout without them.
    They cost a bubble, and no GPU has measured them.
    """

    def with_stages(num_stages: int) -> list[Choice]:
        layouts = candidates(teacher, student, machine, base, global_batch_size, num_stages)
        return [evaluate(teacher, student, machine, layout, global_batch_size) for layout in layouts]

    found = with_stages(1) + (with_stages(base.pp) if base.pp > 1 else [])
    if found and not any(choice.fits for choice in found):
        found += [choice for number in NUMBERS_OF_STAGES if number != base.pp for choice in with_stages(number)]
    return sorted(
        found, key=lambda choice: (not choice.fits, choice.step.total if choice.fits else choice.memory["total"])
    )
