"""Layouts that a cluster allows, what each needs and how fast it is, and the one to take."""

from collections.abc import Iterator
from dataclasses import dataclass

from minitron_train.arch import Shape
from minitron_train.plan.counts import forward_flops_per_token, parameters_per_rank, training_flops_per_token
from minitron_train.plan.hardware import Hardware
from minitron_train.plan.memory import FP32, Layout, distill_bytes, needed

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step by what they are spent on; nothing is assumed to overlap."""

    compute: float
    optimizer: float
    tp_network: float
    dp_network: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.optimizer + self.tp_network + self.dp_network


def candidates(
    teacher: Shape, student: Shape, machine: Hardware, base: Layout, global_batch_size: int
) -> Iterator[Layout]:
    """Every tensor-parallel size inside a node that both shapes allow, micro-batch size and recompute choice."""
    for tp in range(1, machine.gpus_per_node + 1):
        if machine.gpus_per_node % tp or not all(divides(shape, tp) for shape in (teacher, student)):
            continue
        dp = machine.num_gpus // tp
        for micro in MICRO_BATCH_SIZES:
            if global_batch_size % (dp * micro):
                continue
            for recompute in ("none", "full"):
                yield Layout(
                    tp=tp,
                    dp=dp,
                    micro_batch_size=micro,
                    seq_length=base.seq_length,
                    weight_bytes=base.weight_bytes,
                    teacher_weight_bytes=base.teacher_weight_bytes,
                    runtime_bytes=base.runtime_bytes,
                    recompute=recompute,
                    sequence_parallel=tp > 1 and machine.cuda,
                    sharded_optimizer=machine.cuda,
                    cuda=machine.cuda,
                )


def divides(shape: Shape, tp: int) -> bool:
    """Whether tensor parallelism of `tp` cuts the shape evenly (the rule of Shape.check_parallel)."""
    sizes = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size, shape.vocab_size)
    return all(size % tp == 0 for size in sizes)


def tp_bytes_per_token(teacher: Shape, student: Shape, layout: Layout) -> float:
    """Bytes that one rank sends per token: an all-reduce (a ring: 2 (tp - 1) / tp of the data) after attention and MLP,
    in the teacher's forward pass, the student's forward and backward, and the forward that recompute repeats.
    """
    ring = 2 * (layout.tp - 1) / layout.tp
    student_passes = 3 if layout.recompute == "full" else 2
    hidden = teacher.num_layers * teacher.hidden_size + student_passes * student.num_layers * student.hidden_size
    return ring * 2 * hidden * layout.weight_bytes


def dp_bytes_per_step(student: Shape, layout: Layout) -> float:
    """Bytes that one rank sends per step: fp32 gradients are summed; with a sharded optimizer the weights come back."""
    own, ring = parameters_per_rank(student, layout.tp), (layout.dp - 1) / layout.dp
    if layout.sharded_optimizer:
        return ring * own * (FP32 + layout.weight_bytes)
    return 2 * ring * own * FP32


def step_time(teacher: Shape, student: Shape, machine: Hardware, layout: Layout, global_batch_size: int) -> StepTime:
    """Seconds of one optimizer step of this rank."""
    tokens = global_batch_size * layout.seq_length / layout.dp
    flops = forward_flops_per_token(teacher, layout.seq_length) + training_flops_per_token(student, layout.seq_length)
    if layout.recompute == "full":
        flops += forward_flops_per_token(student, layout.seq_length)
    updated = parameters_per_rank(student, layout.tp) // (layout.dp if layout.sharded_optimizer else 1)
    across_nodes = machine.num_gpus > machine.gpus_per_node
    return StepTime(
        compute=tokens * flops / layout.tp / machine.flops,
        optimizer=updated * 10 * FP32 / machine.memory_rate,
        tp_network=tokens * tp_bytes_per_token(teacher, student, layout) / machine.link_rate(layout.tp),
        dp_network=dp_bytes_per_step(student, layout)
        / (machine.inter_node_rate if across_nodes else machine.intra_node_rate),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A layout with its memory and its speed."""

    layout: Layout
    memory: dict[str, int]
    step: StepTime
    fits: bool


def evaluate(teacher: Shape, student: Shape, machine: Hardware, layout: Layout, global_batch_size: int) -> Choice:
    """What a layout needs and how long its step takes."""
    memory = distill_bytes(teacher, student, layout)
    step = step_time(teacher, student, machine, layout, global_batch_size)
    return Choice(layout=layout, memory=memory, step=step, fits=needed(memory) <= machine.memory_bytes)


def all_choices(
    teacher: Shape, student: Shape, machine: Hardware, base: Layout, global_batch_size: int
) -> list[Choice]:
    """Every layout of the cluster, the fitting and fast ones first; the first one is recommended if it fits."""
    found = [
        evaluate(teacher, student, machine, layout, global_batch_size)
        for layout in candidates(teacher, student, machine, base, global_batch_size)
    ]
    return sorted(
        found, key=lambda choice: (not choice.fits, choice.step.total if choice.fits else choice.memory["total"])
    )
