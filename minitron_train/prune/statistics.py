"""Running statistics of activations, from which all nine aggregations of arXiv 2407.14679 table 13 follow. Pure maths.

One sequence gives, for every channel, three values: mean |x|, sqrt(Σ x²) and the variance over its tokens. Over the
batch, each of the three is kept as a count, a mean and a sum of squared deviations, merged exactly (Chan et al. 1979),
so that the result does not depend on how the batch was split. The values are never negative, hence over n sequences

    mean(|a|) = mean        L2(a) = sqrt(deviations + n mean²)        var(a) = deviations / n
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.config import Aggregation

# S sequence, B batch, C channels (the rank's own)
ORDER = (Aggregation.mean, Aggregation.l2, Aggregation.var)  # of the per-sequence values in `Moments`
BLOCK_TOKENS = 32  # positions that are widened to fp32 and reduced at once: the scratch stays in the cache


def over_sequence(x_SBC: Tensor, mask_SB: Tensor | None = None) -> Tensor:
    """mean |x|, L2 and variance of every sequence over its tokens, fp64 [3, B, C].

    Sums are fp32 inside a block of tokens and fp64 across blocks; no fp32 copy of the activation is made.

    Args:
        mask_SB: bool, False marks padding, which never counts; None when there is none.
    """
    sums = torch.zeros(3, *x_SBC.shape[1:], dtype=torch.float64, device=x_SBC.device)  # of x, |x| and x²
    scratch = torch.empty(min(BLOCK_TOKENS, len(x_SBC)), *x_SBC.shape[1:], dtype=torch.float32, device=x_SBC.device)
    ones = torch.ones(1, len(scratch), device=x_SBC.device)
    for start in range(0, len(x_SBC), BLOCK_TOKENS):
        x = x_SBC[start : start + BLOCK_TOKENS]
        block, one = scratch[: len(x)], ones[:, : len(x)]
        if mask_SB is not None:
            x = x.masked_fill(~mask_SB[start : start + BLOCK_TOKENS, :, None], 0.0)
        if x.dtype is not torch.float32:
            x = block.copy_(x)
        sums[0] += (one @ x.flatten(1)).view_as(sums[0])
        torch.abs(x, out=block)
        sums[1] += (one @ block.flatten(1)).view_as(sums[1])
        block.square_()
        sums[2] += (one @ block.flatten(1)).view_as(sums[2])
    length = len(x_SBC) if mask_SB is None else mask_SB.sum(0)[:, None].double()
    mean, mean_abs, mean_square = sums / length
    variance = (mean_square - mean.square()).clamp(min=0.0)
    return torch.stack([mean_abs, sums[2].sqrt(), variance])


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squared deviations over the batch of the three per-sequence values of every channel."""

    count: Tensor  # fp64 scalar, sequences
    mean: Tensor  # fp64 [3, C]
    deviations: Tensor  # fp64 [3, C]

    @classmethod
    def of(cls, values_3BC: Tensor) -> "Moments":
        """Of one micro-batch."""
        values = values_3BC.double()
        mean = values.mean(1)
        deviations = (values - mean[:, None]).square().sum(1)
        return cls(torch.tensor(float(values.shape[1]), dtype=torch.float64, device=values.device), mean, deviations)

    def merge(self, other: "Moments") -> "Moments":
        """Of both batches together; exact up to rounding, in any order."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(
            count,
            self.mean + delta * share,
            self.deviations + other.deviations + delta.square() * self.count * share,
        )

    def aggregate(self, sequence: Aggregation, batch: Aggregation) -> Tensor:
        """One of the nine aggregations of table 13, fp64 [C]."""
        k = ORDER.index(sequence)
        mean, deviations = self.mean[k], self.deviations[k]
        if batch is Aggregation.mean:
            return mean
        if batch is Aggregation.l2:
            return (deviations + self.count * mean.square()).sqrt()
        return deviations / self.count


def distance(before_SBH: Tensor, after_SBH: Tensor, mask_SB: Tensor | None = None) -> Tensor:
    """Σ over tokens of 1 - cos between a layer's input and output, and the number of tokens, fp64 [2]."""
    gap_SB = 1.0 - torch.nn.functional.cosine_similarity(before_SBH.float(), after_SBH.float(), dim=-1)
    weight_SB = torch.ones_like(gap_SB) if mask_SB is None else mask_SB
    return torch.stack([(gap_SB * weight_SB).double().sum(), weight_SB.double().sum()])
