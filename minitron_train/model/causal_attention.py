"""Causal attention in bf16 on a CPU, by products of whole matrices.

torch's flash kernel (2.13, CPU) multiplies tiles of bf16 at about a third of the rate of `torch.bmm` (avx512_bf16, no AMX). Here
a block of queries meets all keys up to its end in one product. Scores and
probabilities are rounded to bf16 as in transformers' eager attention; sums and the softmax are computed in fp32. Only one block
of scores is held. The backward pass computes it again.

Legend: S tokens, B sequences, N query heads, G KV groups, D channels per head, M = B G, R query rows of one group in a block
(its heads x its tokens), K keys up to the end of the block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_TOKENS = 128


def causal_attention(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, scale: float | None = None) -> Tensor:
    """Context [S, B, N * D] of queries that attend to their own token and earlier ones; `scale` None is 1 / sqrt(D)."""
    scale = query_SBND.shape[-1] ** -0.5 if scale is None else scale
    return CausalAttention.apply(query_SBND, key_SBGD, value_SBGD, scale)  # type: ignore[return-value]


class CausalAttention(torch.autograd.Function):
    """(queries [S, B, N, D], keys and values [S, B, G, D], scale) -> context [S, B, N * D]; saves its inputs."""

    @staticmethod
    def forward(ctx: Any, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, scale: float) -> Tensor:
        """Compute the context block by block."""
        ctx.save_for_backward(query_SBND, key_SBGD, value_SBGD)
        ctx.scale = scale
        key_MSD, value_MSD = by_group(key_SBGD), by_group(value_SBGD)
        context_SBND = torch.empty_like(query_SBND, memory_format=torch.contiguous_format)
        for block in blocks(query_SBND, key_MSD, key_SBGD.shape[2], scale):
            block.scatter(torch.bmm(block.probabilities_MRK, value_MSD[:, block.keys]), context_SBND)
        return context_SBND.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBF: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        """Gradients of queries, keys and values. Those of keys and values are summed in fp32 over the blocks."""
        query_SBND, key_SBGD, value_SBGD = ctx.saved_tensors
        key_MSD, value_MSD = by_group(key_SBGD), by_group(value_SBGD)
        query_grad_SBND = torch.empty_like(query_SBND, memory_format=torch.contiguous_format)
        key_grad_MSD, value_grad_MSD = (torch.zeros_like(x, dtype=torch.float32) for x in (key_MSD, value_MSD))
        for block in blocks(query_SBND, key_MSD, key_SBGD.shape[2], ctx.scale):
            grad_MRD = block.gather(grad_SBF.view(query_SBND.shape))
            probabilities_MRK = block.probabilities_MRK
            value_grad_MSD[:, block.keys] += torch.bmm(probabilities_MRK.mT, grad_MRD)
            grad_MRK = torch.bmm(grad_MRD, value_MSD[:, block.keys].mT)
            grad_MRK = torch.ops.aten._softmax_backward_data(grad_MRK, probabilities_MRK, -1, grad_MRK.dtype)
            key_grad_MSD[:, block.keys] += torch.bmm(grad_MRK.mT, block.query_MRD)
            block.scatter(torch.bmm(grad_MRK, key_MSD[:, block.keys]).mul_(block.scale), query_grad_SBND)
        key_grad, value_grad = (from_groups(x, key_SBGD) for x in (key_grad_MSD, value_grad_MSD))
        return query_grad_SBND, key_grad, value_grad, None


@dataclass(frozen=True, slots=True)
class Block:
    """Some tokens' queries, scaled, and the probabilities with which they attend to the keys."""

    tokens: slice
    num_groups: int
    scale: float
    query_MRD: Tensor
    probabilities_MRK: Tensor

    @property
    def keys(self) -> slice:
        """Tokens that the block attends to."""
        return slice(0, self.tokens.stop)

    def gather(self, x_SBND: Tensor) -> Tensor:
        """The block's part of a tensor, [M, R, D]."""
        return gathered(x_SBND[self.tokens], self.num_groups)

    def scatter(self, x_MRD: Tensor, out_SBND: Tensor) -> None:
        """Write the block's part of a tensor."""
        part = out_SBND[self.tokens].unflatten(2, (self.num_groups, -1))
        length, batch, groups, heads, channels = part.shape
        part.copy_(x_MRD.view(batch, groups, heads, length, channels).permute(3, 0, 1, 2, 4))


def blocks(query_SBND: Tensor, key_MSD: Tensor, num_groups: int, scale: float) -> Iterator[Block]:
    """Yield the blocks of a sequence in order."""
    length = len(query_SBND)
    for start in range(0, length, BLOCK_TOKENS):
        tokens = slice(start, min(start + BLOCK_TOKENS, length))
        query_MRD = gathered(query_SBND[tokens], num_groups).mul_(scale)
        scores_MRK = torch.bmm(query_MRD, key_MSD[:, : tokens.stop].mT)
        size = tokens.stop - start
        future = torch.full((size, size), -torch.inf, dtype=scores_MRK.dtype).triu_(1)
        scores_MRK.unflatten(1, (-1, size))[..., start:] += future
        yield Block(tokens, num_groups, scale, query_MRD, torch.softmax(scores_MRK, -1))


def gathered(x_SBND: Tensor, num_groups: int) -> Tensor:
    """A copy with the heads of a group side by side, [M, R, D]."""
    parted = x_SBND.unflatten(2, (num_groups, -1)).permute(1, 2, 3, 0, 4)
    return parted.clone(memory_format=torch.contiguous_format).flatten(2, 3).flatten(0, 1)


def by_group(x_SBGD: Tensor) -> Tensor:
    """Keys or values with the tokens of a group side by side, [M, S, D]."""
    return x_SBGD.permute(1, 2, 0, 3).flatten(0, 1)


def from_groups(x_MSD: Tensor, like_SBGD: Tensor) -> Tensor:
    """The inverse of `by_group`, in the dtype of `like_SBGD`."""
    out = torch.empty_like(like_SBGD, memory_format=torch.contiguous_format)
    return out.copy_(x_MSD.unflatten(0, like_SBGD.shape[1:3]).permute(2, 0, 1, 3))
