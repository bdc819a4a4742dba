"""The training objective over pipeline stages.

Each stage runs its layers of both models. The last one computes the loss on logits, and each one that of its pairs of layers.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from minitron_train.data.stream import Batch
from minitron_train.distillation.hidden import AlsoBackward
from minitron_train.distillation.loss import LossSpec
from minitron_train.distillation.step import LossSums, Objective, StepLosses, add
from minitron_train.parallel.pipeline import Link, run_stages

T = TypeVar("T")
Finish = Callable[[Batch, Tensor, Tensor | None], tuple[Tensor, T]]


def losses_through_stages(
    objective: Objective,
    batches: list[Batch],
    weight: float,
    num_tokens: Tensor,
    *,
    before: Callable[[Batch], None] | None = None,
    forward_only: bool = False,
) -> LossSums:
    """The configured losses of micro-batches, summed over their tokens and over all stages; collective.

    Args:
        weight: that of the loss on hidden states.
        num_tokens: the gradients are those of the sum divided by this number.
        before, forward_only: as in `through_stages`.
    """
    sums: LossSums = {}

    def counted(losses: StepLosses) -> Tensor:
        nonlocal sums
        sums = add(sums, losses.sums)
        return losses.total / num_tokens.to(losses.total.dtype)

    def finish(batch: Batch, student_SBH: Tensor, teacher_SBH: Tensor | None) -> tuple[Tensor, None]:
        return counted(objective.losses(batch, student_SBH, teacher_SBH, weight)), None

    def along(batch: Batch, student_SBH: Tensor) -> Tensor:
        return cast(Tensor, AlsoBackward.apply(student_SBH, counted(objective.hidden_losses(batch, weight))))

    through_stages(
        objective,
        batches,
        objective.spec,
        finish,
        along=None if objective.hidden is None else along,
        before=before,
        forward_only=forward_only,
    )
    return objective.over_stages(sums)


def through_stages(
    objective: Objective,
    batches: list[Batch],
    spec: LossSpec,
    finish: Finish[T],
    *,
    along: Callable[[Batch, Tensor], Tensor] | None = None,
    before: Callable[[Batch], None] | None = None,
    forward_only: bool = False,
) -> list[T]:
    """Run micro-batches of equal size through all stages; collective over the ranks that hold one model together.

    Args:
        spec: decides whether the teacher runs.
        finish: called on the last stage with a batch and the final hidden states of student and teacher. Returns the scalar
            that the backward pass begins with, and a result.
        along: called on the other stages with a batch and the student's output. Returns the output for the next stage.
        before: called on each stage before it computes a batch.
        forward_only: without backward passes.

    Returns:
        The results of `finish`, in order; empty on the other stages.
    """
    teacher = objective.teacher_of(spec)
    link = Link(objective.groups, objective.model.config, teacher and teacher.config)

    def step(waiting: Iterator[Batch], _: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, T]]]:
        batch = next(waiting)
        if before is not None:
            before(batch)
        if teacher is not None:
            teacher.set_input_tensor(cast(Tensor, link.arrived))
        student_SBH, link.leaving = objective.forward(batch, spec)
        teacher_SBH = link.leaving
        if along is not None and not objective.groups.is_last_stage:
            student_SBH = along(batch, student_SBH)

        def loss(output_SBH: Tensor) -> tuple[Tensor, Tensor, T]:
            total, result = finish(batch, output_SBH, teacher_SBH)
            return total, torch.zeros((), dtype=torch.int), result  # megatron-core's count of tokens is not used

        return student_SBH, loss

    rows, length = batches[0].tokens_BS.shape
    return run_stages(objective.student, step, batches, link=link, shape=(rows, length), forward_only=forward_only)
