"""A teacher's distributions as a few weighted token ids each, and the forward KL from them.

The weights are unbiased: the expected weight of token v at temperature T is the teacher's probability q_v = softmax(t / T)_v
(arXiv 2503.16870; `sampling.py` draws them). With p = softmax(s / T), the loss of a row is

    sum_k w_k (-log p_k) - H(q)        its gradient with respect to s:  (p sum_k w_k - w) / T

Both are unbiased estimates of the forward KL's. The teacher's entropy H(q) is exact, so the value may be negative.

Legend: N tokens, K most ids of a token, R rows and C columns of a block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron_train.distillation.loss_blocks import Block
from minitron_train.distillation.loss_terms import (
    Group,
    RunningSoftmax,
    Term,
    all_reduce,
    is_inside,
    reduce_softmaxes,
    scatter_inside,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What a teacher says about N tokens.

    Attributes:
        ids_NK: distinct token ids of each token, int64.
        weights_NK: their weights, float32; 0 fills up rows with fewer ids.
        entropy: sum of the exact entropies of the valid tokens, nats.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    entropy: float

    def of_tokens(self, valid: Tensor) -> "Samples":
        """Those of the valid tokens, by their numbers."""
        return replace(self, ids_NK=self.ids_NK[valid], weights_NK=self.weights_NK[valid])


class SampledKL(Term):
    """The forward KL from samples. The teacher's entropy is spread evenly over the rows: only their sum is used.

    Args:
        start: this tensor-parallel rank's first vocabulary row.
    """

    def __init__(self, like_N: Tensor, temperature: float, samples: Samples, start: int) -> None:
        self.student = RunningSoftmax(like_N, temperature)
        self.columns_NK = samples.ids_NK - start
        self.weights_NK = samples.weights_NK.to(like_N.dtype)
        self.mass_N = self.weights_NK.sum(dim=1).double()
        self.weighted_N = torch.zeros_like(self.mass_N)  # sum of w s over the ids of this rank
        self.entropy = samples.entropy / max(1, len(like_N))

    def observe(self, sweep: int, block: Block) -> None:
        """The normaliser, and the logits of the ids that this block contains."""
        student_RC, rows = block.student_RC, block.rows
        self.student.observe(rows, student_RC, block.scratch_RC(0))
        columns_RK = self.columns_NK[rows] - block.columns.start
        logits_RK = student_RC.gather(1, columns_RK.clamp(0, student_RC.shape[1] - 1))
        inside_RK = torch.where(is_inside(columns_RK, student_RC), logits_RK * self.weights_NK[rows], 0)
        self.weighted_N[rows] += inside_RK.sum(dim=1, dtype=torch.float64)

    def reduce(self, sweep: int, group: Group) -> None:
        """The loss of every row."""
        reduce_softmaxes(group, self.student)
        weighted_N = all_reduce(self.weighted_N, group) / self.student.temperature
        self.loss_N = self.mass_N * self.student.log_normaliser_N - weighted_N - self.entropy

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """(p sum w - w) / T."""
        rows, weight = block.rows, weight.double() / self.student.temperature
        self.student.exp(rows, block.student_RC, out_RC)
        out_RC.mul_(self.student.scale(rows, weight * self.mass_N[rows]))
        columns_RK = self.columns_NK[rows] - block.columns.start
        scatter_inside(out_RC, columns_RK, self.weights_NK[rows] * -weight.to(out_RC.dtype))
