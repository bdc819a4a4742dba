"""Validation: the student's KL to the teacher and its cross-entropy on held-out tokens."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.config import LossKind
from minitron_train.data.stream import Batch
from minitron_train.distillation.loss import LossParts, LossSpec
from minitron_train.distillation.pipeline import through_stages
from minitron_train.distillation.step import Objective
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.signals import Interrupted
from minitron_train.train.batches import held_out_batches

BATCHES_PER_STAGE = 4  # of a round: a stage waits for less than a fifth of the round, and signals wait for one round


@dataclass(frozen=True, slots=True)
class Validation:
    """Computes forward KL(teacher || student) and cross-entropy on held-out sequences (see data.stream.validation_tokens)."""

    tokens: Tensor
    objective: Objective
    batch_size: int
    groups: Groups

    @torch.no_grad()
    def __call__(self, is_stopped: Callable[[], bool]) -> dict[str, float]:
        """Return `eval.validation.kl` (with a teacher), `.loss` and `.perplexity`; collective.

        The call changes neither random states nor the model's mode, so it does not affect training.

        Args:
            is_stopped: called after each round of batches; the same answer on all ranks that hold one model, and of an expert
                group.

        Raises:
            Interrupted: `is_stopped` was true on any rank; raised on every rank.
        """
        spec = LossSpec(kind=LossKind.forward_kl, kd_weight=float(self.objective.has_teacher), ce_weight=1.0)
        student, was_training = self.objective.student, self.objective.student.training
        sums = torch.zeros(4, dtype=torch.float64, device=self.groups.device)
        student.eval()
        try:
            for batches in self.rounds():
                sums[:3] += self.sums_of(batches, spec)
                stopped = is_stopped()
                sums[3] += stopped
                if stopped:
                    break
        finally:
            student.train(was_training)
        kl, loss, count, num_stopped = self.groups.sum_over_data(sums).tolist()
        if num_stopped:
            raise Interrupted
        kl, loss = kl / count, loss / count
        found = {"eval.validation.loss": loss, "eval.validation.perplexity": math.exp(min(loss, 700.0))}
        return {"eval.validation.kl": kl, **found} if self.objective.has_teacher else found

    def rounds(self) -> Iterator[list[Batch]]:
        """Yield this rank's batches, as many at a time as are computed before the next look at signals.

        That is one batch. Over pipeline stages, it is several of equal size, so that all stages compute at once.
        """
        waiting: list[Batch] = []
        most = 1 if self.groups.pp_size == 1 else BATCHES_PER_STAGE * self.groups.pp_size
        for batch in held_out_batches(self.tokens, self.batch_size, self.groups):
            if waiting and (len(waiting) == most or waiting[0].tokens_BS.shape != batch.tokens_BS.shape):
                yield waiting
                waiting = []
            waiting.append(batch)
        if waiting:
            yield waiting

    def sums_of(self, batches: list[Batch], spec: LossSpec) -> Tensor:
        """KL and cross-entropy of batches, summed over their tokens, and their number: fp64 [3], on all pipeline stages."""

        def finish(batch: Batch, student_SBH: Tensor, teacher_SBH: Tensor | None) -> tuple[Tensor, LossParts]:
            parts = self.objective.loss_parts(batch, spec, student_SBH, teacher_SBH)
            return parts.total, parts

        if self.groups.pp_size == 1:
            found = [self.objective.logit_loss(batch, spec) for batch in batches]
        else:
            found = through_stages(self.objective, batches, spec, finish, forward_only=True)
        sums = torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        for parts in found:
            sums += torch.stack([parts.kd_sum.double(), parts.ce_sum.double(), sums.new_tensor(parts.num_valid)])
        return self.groups.from_last_stage(sums)
