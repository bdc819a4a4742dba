"""The sum of the residual stream and what attention or MLP adds to it, where megatron-core's own is not enough."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Output = tuple[Tensor, Tensor | None]  # of a layer's second linear, [S, B, H], without its bias, and this bias


class ScaledSum(torch.nn.Module):
    """stream + multiplier x (output + bias). It replaces megatron-core's `get_bias_dropout_add`, without dropout."""

    def __init__(self, multiplier: float) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, *_: Any) -> Callable[[Output, Tensor, float], Tensor]:
        """Return `add`, as megatron-core's layers expect."""
        return self.add

    def add(self, output_with_bias: Output, stream_SBH: Tensor, dropout: float) -> Tensor:
        """The new residual stream, [S, B, H]."""
        assert not dropout
        output_SBH, bias_H = output_with_bias
        branch_SBH = output_SBH if bias_H is None else output_SBH + bias_H
        return stream_SBH + branch_SBH * self.multiplier

    def before(self, gap_SBH: Tensor) -> Tensor:
        """The output with bias that adds `gap_SBH` to the stream."""
        return gap_SBH / self.multiplier
