"""Attention and MLP of a layer as rotation and repair run them: products in bf16 or fp32, the residual stream in fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron_train.model.branch import BranchSum
from minitron_train.model.norm import ProjectionNorm

# S sequence, B batch, H hidden


@dataclass(frozen=True, slots=True)
class Half:
    """Attention or MLP of a layer: norm, first linear, second linear, and the sum with the residual stream."""

    norm: str
    first: str
    second: str
    sum: str
    run: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor | None]]
    # layer, normalised stream, rotary -> the second linear's output without its bias, and this bias

    def forward(self, layer: torch.nn.Module, stream_SBH: Tensor, rotary: Tensor, dtype: torch.dtype) -> Tensor:
        """The residual stream after this half, in the stream's dtype; matrices are multiplied in `dtype`."""
        with torch.autocast(stream_SBH.device.type, dtype, enabled=dtype != stream_SBH.dtype):
            output, bias = self.run(layer, layer.get_submodule(self.norm)(stream_SBH), rotary)
        return getattr(layer, self.sum)(False, False)((output.to(stream_SBH.dtype), bias), stream_SBH, 0.0)

    @property
    def outer(self) -> str:
        """Name of the norm between the second linear and the residual stream."""
        return f"{self.sum}.layernorm"

    def inner_norms(self, layer: torch.nn.Module) -> tuple[list[str], list[str]]:
        """Names of this half's norms over the outputs of its first linear, and of its second linear."""
        branch, parent = self.branch(layer), self.first.rpartition(".")[0]
        children = layer.get_submodule(parent).named_children()
        inner = [f"{parent}.{name}" for name, module in children if isinstance(module, ProjectionNorm)]
        return inner, [] if branch is None or branch.layernorm is None else [self.outer]

    def branch(self, layer: torch.nn.Module) -> BranchSum | None:
        """The sum with the residual stream, unless it is megatron-core's plain one."""
        module = getattr(layer, self.sum)
        return module if isinstance(module, BranchSum) else None


HALVES = (
    Half(
        "input_layernorm",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "self_attn_bda",
        lambda layer, x, rotary: layer.self_attention(x, attention_mask=None, rotary_pos_emb=rotary),
    ),
    Half("pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2", "mlp_bda", lambda layer, x, _: layer.mlp(x)),
)


def forward(layer: torch.nn.Module, stream_SBH: Tensor, rotary: Tensor, dtype: torch.dtype) -> Tensor:
    """The residual stream after both halves of a layer, see Half.forward."""
    for half in HALVES:
        stream_SBH = half.forward(layer, stream_SBH, rotary, dtype)
    return stream_SBH
