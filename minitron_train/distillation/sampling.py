"""Draws from a teacher's next-token distribution: importance sampling with replacement (arXiv 2503.16870 §4).

With the teacher's q = softmax(t / T) and a proposal r proportional to q^e, K draws x_1 … x_K from r give token v the weight
1/K sum_k [x_k = v] q_v / r_v, whose expectation is q_v. With e = 1 the ratio is 1 and the weights are counts / K.

Legend: N tokens, V vocabulary rows of this tensor-parallel rank, K draws.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_train.distillation.loss_terms import Group, all_reduce


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Draws of N tokens, equal on all tensor-parallel ranks."""

    ids_NK: Tensor  # int64
    ratios_NK: Tensor  # fp64: the teacher's probability over the proposal's
    entropy_N: Tensor  # fp64: the exact entropy of the teacher's distribution, nats


def draw(
    logits_NV: Tensor, uniforms_NK: Tensor, *, temperature: float, exponent: float, start: int = 0, group: Group = None
) -> Draws:
    """Invert the proposal's cumulative sum, in fp64: in fp32 it would miss tokens of small probability.

    Args:
        logits_NV: the teacher's, of vocabulary rows `start` to `start` + V.
        uniforms_NK: fp64 numbers in [0, 1), the same on all ranks of `group`.
        exponent: e.
    """
    x_NV = logits_NV.double() / temperature
    x_NV -= all_reduce(x_NV.amax(dim=1), group, dist.ReduceOp.MAX)[:, None]
    normaliser_N, mean_N = all_reduce(torch.stack([x_NV.exp().sum(1), (x_NV.exp() * x_NV).sum(1)]), group)
    cumulative_NV = (exponent * x_NV).exp().cumsum(dim=1)
    first_N, end_N, total_N = place_in_group(cumulative_NV[:, -1].contiguous(), group)
    wanted_NK = uniforms_NK * total_N[:, None]
    wanted_NK = wanted_NK.minimum(torch.nextafter(total_N, torch.zeros_like(total_N))[:, None])
    mine_NK = wanted_NK - first_N[:, None]
    is_mine_NK = (wanted_NK >= first_N[:, None]) & (wanted_NK < end_N[:, None])
    last_N1 = torch.searchsorted(cumulative_NV, cumulative_NV[:, -1:].contiguous())  # the last row of probability > 0
    columns_NK = torch.searchsorted(cumulative_NV, mine_NK.contiguous(), right=True).minimum(last_N1)
    log_p_NK = x_NV.gather(1, columns_NK)
    found = torch.stack([(columns_NK + start).double(), log_p_NK]) * is_mine_NK  # ids below 2^53 are exact in fp64
    ids_NK, log_p_NK = all_reduce(found, group)
    ratios_NK = ((1 - exponent) * log_p_NK).exp() * (total_N / normaliser_N)[:, None]
    return Draws(ids_NK=ids_NK.long(), ratios_NK=ratios_NK, entropy_N=normaliser_N.log() - mean_N / normaliser_N)


def place_in_group(mass_N: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The mass of the ranks before this one, with this one, and of all ranks, summed in the same order on every rank."""
    if group is None or group.size() == 1:
        return torch.zeros_like(mass_N), mass_N, mass_N
    parts = [torch.empty_like(mass_N) for _ in range(group.size())]
    dist.all_gather(parts, mass_N, group=group)
    ends = torch.stack([torch.zeros_like(mass_N), *parts]).cumsum(dim=0)
    return ends[group.rank()], ends[group.rank() + 1], ends[-1]
