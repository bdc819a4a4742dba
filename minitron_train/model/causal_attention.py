"""Attention in bf16 on a CPU, by products of whole matrices.

torch's flash kernel (2.13, CPU) multiplies tiles of bf16 at about a third of the rate of `torch.bmm` (avx512_bf16, no AMX), and
one query at a fifteenth. Here a block of queries meets all keys up to its end in one product. Scores and
probabilities are rounded to bf16 as in transformers' eager attention; sums and the softmax are computed in fp32. Only one block
of scores is held. The backward pass computes it again.

Legend: S tokens, B sequences, N query heads, G KV groups, L query heads of a group, D channels per head, M = B G, R query rows of
one group in a block (its heads x its tokens), K keys up to the end of the block, P keys of a cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_TOKENS = 128


def causal_attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Context [S, B, N * D] of queries that attend to their own token and earlier ones, `window` tokens in all.

    Args:
        scale: factor of query x key; None is 1 / sqrt(D).
    """
    scale = query_SBND.shape[-1] ** -0.5 if scale is None else scale
    return CausalAttention.apply(query_SBND, key_SBGD, value_SBGD, window, scale)  # type: ignore[return-value]


class CausalAttention(torch.autograd.Function):
    """(queries [S, B, N, D], keys and values [S, B, G, D], window, scale) -> context [S, B, N * D]; saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, window: int | None, scale: float
    ) -> Tensor:
        """Compute the context block by block."""
        ctx.save_for_backward(query_SBND, key_SBGD, value_SBGD)
        ctx.window, ctx.scale = window, scale
        key_MSD, value_MSD = by_group(key_SBGD), by_group(value_SBGD)
        context_SBND = torch.empty_like(query_SBND, memory_format=torch.contiguous_format)
        for block in blocks(query_SBND, key_MSD, key_SBGD.shape[2], window, scale):
            block.scatter(torch.bmm(block.probabilities_MRK, value_MSD[:, block.keys]), context_SBND)
        return context_SBND.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBF: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        """Gradients of queries, keys and values. Those of keys and values are summed in fp32 over the blocks."""
        query_SBND, key_SBGD, value_SBGD = ctx.saved_tensors
        key_MSD, value_MSD = by_group(key_SBGD), by_group(value_SBGD)
        query_grad_SBND = torch.empty_like(query_SBND, memory_format=torch.contiguous_format)
        key_grad_MSD, value_grad_MSD = (torch.zeros_like(x, dtype=torch.float32) for x in (key_MSD, value_MSD))
        for block in blocks(query_SBND, key_MSD, key_SBGD.shape[2], ctx.window, ctx.scale):
            grad_MRD = block.gather(grad_SBF.view(query_SBND.shape))
            probabilities_MRK = block.probabilities_MRK
            value_grad_MSD[:, block.keys] += torch.bmm(probabilities_MRK.mT, grad_MRD)
            grad_MRK = torch.bmm(grad_MRD, value_MSD[:, block.keys].mT)
            grad_MRK = torch.ops.aten._softmax_backward_data(grad_MRK, probabilities_MRK, -1, grad_MRK.dtype)
            key_grad_MSD[:, block.keys] += torch.bmm(grad_MRK.mT, block.query_MRD)
            block.scatter(torch.bmm(grad_MRK, key_MSD[:, block.keys]).mul_(block.scale), query_grad_SBND)
        key_grad, value_grad = (from_groups(x, key_SBGD) for x in (key_grad_MSD, value_grad_MSD))
        return query_grad_SBND, key_grad, value_grad, None, None


def masked_attention(
    query_BNSD: Tensor, key_BGPD: Tensor, value_BGPD: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Context [B, N, S, D] of queries that attend to the keys which a mask shows them. It has no backward pass.

    Args:
        mask: bool (True is seen) or numbers that are added to the scores, [S, P] or [B or 1, 1, S, P]; None shows all keys.
        scale: factor of query x key; None is 1 / sqrt(D).
    """
    factor = query_BNSD.shape[-1] ** -0.5 if scale is None else scale
    key_MPD, value_MPD = (x.flatten(0, 1) for x in (key_BGPD, value_BGPD))
    key_MDP = key_MPD.contiguous().mT  # the product with a part of a longer cache is six times slower
    grouped_BGLSD = query_BNSD.unflatten(1, (key_BGPD.shape[1], -1)) * factor
    context = torch.empty_like(grouped_BGLSD, memory_format=torch.contiguous_format)
    for start in range(0, query_BNSD.shape[2], BLOCK_TOKENS):
        part = slice(start, start + BLOCK_TOKENS)
        queries = grouped_BGLSD[..., part, :]
        scores_MRP = torch.bmm(queries.flatten(2, 3).flatten(0, 1), key_MDP)
        if mask is not None:
            hide(scores_MRP.view(*queries.shape[:-1], -1), mask[..., part, :])
        context_MRD = torch.bmm(torch.softmax(scores_MRP, -1), value_MPD)
        context[..., part, :] = context_MRD.view(queries.shape)
    return context.flatten(1, 2)


def hide(scores_BGLSP: Tensor, mask: Tensor) -> None:
    """Apply a mask of `masked_attention` in place. A query that sees no key attends to all, so that it is not NaN."""
    if mask.dim() == 4:
        mask = mask[:, :, None]
    if mask.dtype is torch.bool:
        scores_BGLSP.masked_fill_(~mask, torch.finfo(scores_BGLSP.dtype).min)
    else:
        scores_BGLSP += mask


@dataclass(frozen=True, slots=True)
class Block:
    """Some tokens' queries, scaled, and the probabilities with which they attend to the keys."""

    tokens: slice
    keys: slice  # tokens that the block attends to
    num_groups: int
    scale: float
    query_MRD: Tensor
    probabilities_MRK: Tensor

    def gather(self, x_SBND: Tensor) -> Tensor:
        """The block's part of a tensor, [M, R, D]."""
        return gathered(x_SBND[self.tokens], self.num_groups)

    def scatter(self, x_MRD: Tensor, out_SBND: Tensor) -> None:
        """Write the block's part of a tensor."""
        part = out_SBND[self.tokens].unflatten(2, (self.num_groups, -1))
        length, batch, groups, heads, channels = part.shape
        part.copy_(x_MRD.view(batch, groups, heads, length, channels).permute(3, 0, 1, 2, 4))


def blocks(query_SBND: Tensor, key_MSD: Tensor, num_groups: int, window: int | None, scale: float) -> Iterator[Block]:
    """Yield the blocks of a sequence in order."""
    length = len(query_SBND)
    for start in range(0, length, BLOCK_TOKENS):
        tokens = slice(start, min(start + BLOCK_TOKENS, length))
        keys = slice(0 if window is None else max(0, start - window + 1), tokens.stop)
        query_MRD = gathered(query_SBND[tokens], num_groups).mul_(scale)
        scores_MRK = torch.bmm(query_MRD, key_MSD[:, keys].mT)
        size = tokens.stop - start
        future = torch.full((size, size), -torch.inf, dtype=scores_MRK.dtype).triu_(1)
        scores_MRK.unflatten(1, (-1, size))[..., start - keys.start :] += future
        if window is not None and window < tokens.stop:
            past = torch.full((size, tokens.stop - keys.start), -torch.inf, dtype=scores_MRK.dtype)
            scores_MRK.unflatten(1, (-1, size)).add_(past.tril_(start - window - keys.start))
        yield Block(tokens, keys, num_groups, scale, query_MRD, torch.softmax(scores_MRK, -1))


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
