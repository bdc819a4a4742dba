"""How far the student is from the teacher, and from the text, on tokens that training never sees."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.config import LossKind
from minitron_train.distillation.loss import LossSpec
from minitron_train.distillation.step import Objective
from minitron_train.parallel.groups import Groups
from minitron_train.train.batches import held_out_batch


@dataclass(frozen=True, slots=True)
class Validation:
    """Held-out sequences [N, S + 1] and the forward KL(teacher || student) and cross-entropy on them."""

    tokens: Tensor
    objective: Objective
    batch_size: int
    groups: Groups

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """`eval.validation.kl` (with a teacher), `.loss` and `.perplexity`; collective.

        Changes neither random states nor the model's mode: training goes on as if this had not been called.
        """
        spec = LossSpec(kind=LossKind.forward_kl, kd_weight=float(self.objective.teacher is not None), ce_weight=1.0)
        student, was_training = self.objective.student, self.objective.student.training
        sums = torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        student.eval()
        try:
            for rows in self.groups.own_parts(self.tokens, self.batch_size):
                parts = self.objective.logit_loss(held_out_batch(rows), spec)
                sums += torch.stack([parts.kd_sum.double(), parts.ce_sum.double(), sums.new_tensor(parts.num_valid)])
        finally:
            student.train(was_training)
        kl, loss, count = self.groups.sum_over_data(sums).tolist()
        kl, loss = kl / count, loss / count
        found = {"eval.validation.loss": loss, "eval.validation.perplexity": math.exp(min(loss, 700.0))}
        return {"eval.validation.kl": kl, **found} if self.objective.teacher is not None else found
