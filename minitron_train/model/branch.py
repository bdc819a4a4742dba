"""The sum of the residual stream and what attention or MLP adds to it, where megatron-core's own is not enough."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron_train.model.norm import Norm

Output = tuple[Tensor, Tensor | None]  # of a layer's second linear, [S, B, H], without its bias, and this bias


class BranchSum(torch.nn.Module):
    """stream + multiplier x norm(output + bias). It replaces megatron-core's `get_bias_dropout_add`, without dropout.

    Attributes:
        layernorm: the norm between the second linear and the residual stream (a post-norm), or None.
    """

    def __init__(self, config: TransformerConfig, multiplier: float, has_norm: bool) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon) if has_norm else None

    def forward(self, *_: Any) -> Callable[[Output, Tensor, float], Tensor]:
        """Return `add`, as megatron-core's layers expect."""
        return self.add

    def add(self, output_with_bias: Output, stream_SBH: Tensor, dropout: float) -> Tensor:
        """The new residual stream, [S, B, H]."""
        assert not dropout
        output_SBH, bias_H = output_with_bias
        branch_SBH = output_SBH if bias_H is None else output_SBH + bias_H
        branch_SBH = branch_SBH if self.layernorm is None else self.layernorm(branch_SBH)
        return stream_SBH + (branch_SBH if self.multiplier == 1 else branch_SBH * self.multiplier)
