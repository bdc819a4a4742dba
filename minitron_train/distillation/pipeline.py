"""The training objective over pipeline stages: each stage runs its layers of both models, the last one computes the loss."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from minitron_train.data.stream import Batch
from minitron_train.distillation.loss import LossSpec
from minitron_train.distillation.step import Objective
from minitron_train.parallel.pipeline import Link, run_stages

T = TypeVar("T")
Finish = Callable[[Batch, Tensor, Tensor | None], tuple[Tensor, T]]


def through_stages(
    objective: Objective,
    batches: list[Batch],
    spec: LossSpec,
    finish: Finish[T],
    *,
    before: Callable[[Batch], None] | None = None,
    forward_only: bool = False,
) -> list[T]:
    """Run micro-batches of equal size through all stages; collective over the ranks that hold one model together.

    Args:
        spec: decides whether the teacher runs.
        finish: called on the last stage with a batch and the final hidden states of student and teacher. Returns the scalar
            that the backward pass begins with, and a result.
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

        def loss(output_SBH: Tensor) -> tuple[Tensor, Tensor, T]:
            total, result = finish(batch, output_SBH, teacher_SBH)
            return total, torch.zeros((), dtype=torch.int), result  # megatron-core's count of tokens is not used

        return student_SBH, loss

    rows, length = batches[0].tokens_BS.shape
    return run_stages(objective.student, step, batches, link=link, shape=(rows, length), forward_only=forward_only)
