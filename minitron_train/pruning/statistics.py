"""Running statistics of activations, which give all nine aggregations of arXiv 2407.14679 table 13.

For every channel, one sequence gives three values: mean |x|, sqrt(Σ x²) and the variance over its tokens. Over the batch,
each of the three is stored as a count, a mean and a sum of squared deviations. These merge exactly (Chan et al. 1979), so
the result does not depend on how the batch is split. The values are never negative, so over n sequences

    mean(|a|) = mean        L2(a) = sqrt(deviations + n mean²)        var(a) = deviations / n
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.config import Aggregation

# S sequence, B batch, C channels (local shard)
ORDER = (Aggregation.mean, Aggregation.l2, Aggregation.var)  # order of the per-sequence values in `Moments`
SCRATCH_BYTES = {"cpu": 2**21, "cuda": 2**23}  # size of a block for each thread; on a CPU it fits the L3 cache
FP32_TOKENS = 128  # positions that are summed in fp32; sums over more are fp64


def over_sequence(x_SBC: Tensor, mask_SB: Tensor | None = None) -> Tensor:
    """mean |x|, L2 and variance of every sequence over its tokens, fp64 [3, B, C].

    The activation is read once, in blocks of SCRATCH_BYTES; no fp32 copy of it is made.

    Args:
        mask_SB: bool, False marks padding, which is ignored; None if there is no padding.
    """
    length, width = len(x_SBC), x_SBC[0].numel()
    num_bytes = SCRATCH_BYTES[x_SBC.device.type] * torch.get_num_threads()
    num_rows = max(1, min(FP32_TOKENS, num_bytes // (4 * width)))
    scratch = torch.empty(num_rows, width, device=x_SBC.device)
    one, partial = torch.ones(1, num_rows, device=x_SBC.device), torch.empty(3, width, device=x_SBC.device)
    sums = torch.zeros(3, width, dtype=torch.float64, device=x_SBC.device)  # sums of x, |x| and x²
    for span in range(0, length, FP32_TOKENS):
        partial.zero_()
        stop = min(span + FP32_TOKENS, length)
        for start in range(span, stop, num_rows):
            x = x_SBC[start : min(start + num_rows, stop)]
            if mask_SB is not None:
                x = x.masked_fill(~mask_SB[start : start + len(x), :, None], 0.0)
            add_sums(partial, x, scratch[: len(x)], one[:, : len(x)])
        sums += partial
    counts_B1 = length if mask_SB is None else mask_SB.sum(0)[:, None].double()
    sums = sums.view(3, *x_SBC.shape[1:])
    mean, mean_abs, mean_square = sums / counts_B1
    variance = (mean_square - mean.square()).clamp(min=0.0)
    return torch.stack([mean_abs, sums[2].sqrt(), variance])


def add_sums(sums_3W: Tensor, x_SBC: Tensor, scratch_SW: Tensor, one_1S: Tensor) -> None:
    """Add Σ x, Σ |x| and Σ x² over the rows of `x` to `sums`. A product with a row of ones is the fastest way to sum.

    `x` is read twice at most: x² is |x|², and |x| is still in the cache.
    """
    if x_SBC.dtype is torch.float32 and x_SBC.is_contiguous():
        x_SW = x_SBC.flatten(1)
    else:
        scratch_SW.view_as(x_SBC).copy_(x_SBC)
        x_SW = scratch_SW
    sums_3W[0:1].addmm_(one_1S, x_SW)
    sums_3W[1:2].addmm_(one_1S, torch.abs(x_SW, out=scratch_SW))
    sums_3W[2:3].addmm_(one_1S, scratch_SW.mul_(scratch_SW))


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squared deviations over the batch of the three per-sequence values of every channel."""

    count: Tensor  # fp64 scalar, sequences
    mean: Tensor  # fp64 [3, C]
    deviations: Tensor  # fp64 [3, C]

    @classmethod
    def of(cls, values_3BC: Tensor) -> "Moments":
        """Statistics of one micro-batch."""
        values = values_3BC.double()
        mean = values.mean(1)
        deviations = (values - mean[:, None]).square().sum(1)
        return cls(torch.tensor(float(values.shape[1]), dtype=torch.float64, device=values.device), mean, deviations)

    def cpu(self) -> "Moments":
        """A copy on the CPU."""
        return Moments(self.count.cpu(), self.mean.cpu(), self.deviations.cpu())

    def merge(self, other: "Moments") -> "Moments":
        """Statistics of both batches together; exact up to rounding, in any order."""
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
    """Σ over tokens of 1 - cos between a layer's input and output, and the number of tokens, fp64 [2].

    The activations are read in blocks of SCRATCH_BYTES; no fp32 copy of them is made.
    """
    num_bytes = SCRATCH_BYTES[before_SBH.device.type] * torch.get_num_threads()
    num_rows = max(1, num_bytes // (4 * before_SBH[0].numel()))
    pairs = zip(before_SBH.split(num_rows), after_SBH.split(num_rows), strict=True)
    gap_SB = torch.cat([1.0 - cosine(before.float(), after.float()) for before, after in pairs])
    weight_SB = torch.ones_like(gap_SB) if mask_SB is None else mask_SB
    return torch.stack([(gap_SB * weight_SB).double().sum(), weight_SB.double().sum()])


def cosine(a_SBH: Tensor, b_SBH: Tensor) -> Tensor:
    """Cosine between two fp32 vectors at every token, [S, B]; 0 where one of them is 0."""
    lengths_SB = torch.linalg.vector_norm(a_SBH, dim=-1) * torch.linalg.vector_norm(b_SBH, dim=-1)
    return torch.linalg.vecdot(a_SBH, b_SBH) / lengths_SB.clamp(min=torch.finfo(torch.float32).tiny)
