"""Core attention without the S x S scores, and the attention of layers with a window or a rotary embedding of their own."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minitron_train.arch.layer_kind import LayerKind
from minitron_train.arch.shape import Shape
from minitron_train.model.causal_attention import causal_attention, masked_attention
from minitron_train.model.rotary import columns, num_rotated

# B batch, S sequence, P keys, N query heads held, G KV groups held, D channels per head, C columns of all ropes, W windows

CAPPED_QUERIES = 256  # queries whose scores are held at once where they are capped
BLOCK_QUERIES = 1024  # largest block of queries that meets its keys within a window at once


def needs_whole_heads(query: Tensor, mask: Tensor | None) -> bool:
    """Whether keys and values must be repeated for every query head, to avoid the kernel that holds the S x S scores.

    On CUDA, grouped queries are supported by the flash and math kernels only (torch 2.13, scaled_dot_product_attention).
    Flash takes neither masks nor fp32, and math holds the scores.
    """
    return query.is_cuda and (mask is not None or query.dtype is torch.float32)


def prefers_products(query: Tensor) -> bool:
    """Whether products of whole matrices are faster than torch's kernel for these queries (docs/results.md)."""
    return query.device.type == "cpu" and query.dtype is torch.bfloat16


def whole_heads(x_BGSD: Tensor, num_heads: int) -> Tensor:
    """Repeat keys or values for every query head that shares them, [B, N, S, D]."""
    return x_BGSD.repeat_interleave(num_heads // x_BGSD.shape[1], dim=1)


@functools.lru_cache(maxsize=8)
def window_bias(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What is added to the scores [queries, keys]: -inf hides later keys and those `window` tokens or more before a query.

    The queries are the last tokens. Cached, so that autograd saves one for all layers.
    """
    age = (
        torch.arange(num_queries, device=device)[:, None]
        + num_keys
        - num_queries
        - torch.arange(num_keys, device=device)
    )
    is_hidden = (age < 0) | (age >= (num_keys if window is None else window))
    return torch.zeros(num_queries, num_keys, dtype=dtype, device=device).masked_fill_(is_hidden, -torch.inf)


class SdpaAttention(MegatronModule):
    """Core attention by torch's scaled_dot_product_attention, with kernels that never hold the S x S scores."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *_: Any, **__: Any
    ) -> None:
        super().__init__(config=config)
        self.dropout, self.scale = config.attention_dropout, config.softmax_scale  # a scale of None: 1 / sqrt(D)
        self.window: int | None = None  # tokens that a query attends to, itself included; None: all before it

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Causal attention within the window, or attention under a bool mask [B, 1, S, P] (True hides).

        Where there are fewer queries than keys, the queries are the last tokens (a key/value cache holds the others).

        Args:
            attention_mask: replaces causality and window.
            attention_bias: factor of the queries, [S, B or 1, 1, D or 1] (see LayerAttention); None is 1.
        """
        query_SBND = query_SBND if attention_bias is None else query_SBND * attention_bias.to(query_SBND.dtype)
        num_queries, num_keys, dropout = len(query_SBND), len(key_SBGD), self.dropout if self.training else 0.0
        window = None if self.window is None or self.window >= num_keys else self.window
        if prefers_products(query_SBND) and attention_mask is None and num_queries == num_keys and not dropout:
            return causal_attention(query_SBND, key_SBGD, value_SBGD, window, self.scale)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        if attention_mask is not None:
            context = self._attend(query, key, value, ~attention_mask)
        elif window is not None:
            context = self._attend_within(query, key, value, window)
        elif 1 < num_queries < num_keys:
            context = self._attend(
                query, key, value, window_bias(num_queries, num_keys, None, query.dtype, query.device)
            )
        else:
            context = self._attend(query, key, value, None)
        return context.permute(2, 0, 1, 3).flatten(2)  # [S, B, N * D]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Context [B, N, S, D]; without a mask causal, or one query that attends to all keys."""
        needs_grad = torch.is_grad_enabled() and query.requires_grad
        if prefers_products(query) and not needs_grad and (mask is not None or query.shape[2] == 1):
            return masked_attention(query, key, value, mask, self.scale)
        is_grouped = query.shape[1] != key.shape[1]
        if is_grouped and needs_whole_heads(query, mask):
            key, value, is_grouped = whole_heads(key, query.shape[1]), whole_heads(value, query.shape[1]), False
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] == key.shape[2],
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=is_grouped,
        )

    def _attend_within(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        """Context of queries that attend to `window` tokens, block by block: no block meets keys that it cannot see."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        size, parts = min(BLOCK_QUERIES, max(128, window)), []
        for start in range(0, num_queries, size):
            block = query[:, :, start : start + size]
            last = num_keys - num_queries + start + block.shape[2]
            seen = slice(max(0, last - block.shape[2] - window + 1), last)
            is_plain = block.shape[2] in (1, last) and last - seen.start <= window
            bias = (
                None if is_plain else window_bias(block.shape[2], last - seen.start, window, query.dtype, query.device)
            )
            parts.append(self._attend(block, key[:, :, seen], value[:, :, seen], bias))
        return torch.cat(parts, dim=2)


class CappedAttention(SdpaAttention):
    """Core attention whose scores x become c tanh(x / c), as in Gemma 2 (arXiv 2408.00118 §2).

    torch's kernels have no cap. Scores are computed here in fp32 for a block of queries, which the backward pass repeats.
    """

    def __init__(self, *args: Any, softcap: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.softcap = softcap

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        *_: Any,
        attention_bias: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        """As SdpaAttention.forward."""
        query_SBND = query_SBND if attention_bias is None else query_SBND * attention_bias.to(query_SBND.dtype)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        num_queries, num_keys, parts = query.shape[2], key.shape[2], []
        for start in range(0, num_queries, CAPPED_QUERIES):
            block = query[:, :, start : start + CAPPED_QUERIES]
            last = num_keys - num_queries + start + block.shape[2]
            seen = slice(0, last)
            if attention_mask is None:
                if self.window is not None:
                    seen = slice(max(0, last - block.shape[2] - self.window + 1), last)
                bias = window_bias(block.shape[2], last - seen.start, self.window, torch.float32, query.device)
            else:
                seen, hidden = slice(0, num_keys), attention_mask[:, :, start : start + CAPPED_QUERIES]
                bias = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
            arguments = block, key[:, :, seen], value[:, :, seen], bias
            again = torch.is_grad_enabled() and query.requires_grad
            parts.append(
                checkpoint(self._capped, *arguments, use_reentrant=False) if again else self._capped(*arguments)
            )
        return torch.cat(parts, dim=2).permute(2, 0, 1, 3).flatten(2)

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Context [B, N, S, D] of one block; the query heads of a group share its keys and values."""
        grouped = query.unflatten(1, (key.shape[1], -1))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (grouped @ key[:, :, None].mT).float() * scale
        scores = torch.tanh(scores / self.softcap) * self.softcap + (bias if bias.dim() == 2 else bias[:, :, None])
        weights = F.dropout(scores.softmax(-1).to(value.dtype), self.dropout, self.training)
        return (weights @ value[:, :, None]).flatten(1, 2)


class LayerAttention(SelfAttention):
    """Self-attention of a layer of one `kind` in a model whose layers have windows or rotary embeddings of their own.

    Its rotary_pos_emb [S, B or 1, 1, C] has the columns of all the model's ropes (model.rotary.Rotary). Its mask
    [B, 1 or W, S, P] has a row for each of the model's windows (`window_masks`), or one row for all layers.
    """

    def __init__(self, *args: Any, kind: LayerKind, shape: Shape, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind, self.mask_row = kind, shape.windows.index(kind.window)
        self.core_attention.window = kind.window  # type: ignore[assignment]
        self.columns = None if kind.rope is None else columns(shape, kind.rope)
        scale_D = torch.ones(shape.kv_channels, device=self.linear_proj.weight.device)
        if kind.rope is not None:  # a factor of rotated queries and keys is its square on queries
            scale_D[: num_rotated(kind.rope, shape.kv_channels)] = kind.rope.attention_factor**2
        scales = kind.rope is not None and kind.rope.scales_queries
        self.query_scale_D: Tensor | None
        self.register_buffer("query_scale_D", scale_D if scales else None, persistent=False)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Output [S, B, H] and the bias of the output projection."""
        if attention_mask is not None and attention_mask.shape[1] > 1:
            attention_mask = attention_mask[:, self.mask_row, None]
        own, scale = None, self.query_scale_D
        if self.columns is not None and rotary_pos_emb is not None:
            own = rotary_pos_emb[..., self.columns]
        if own is not None and scale is not None and own.shape[-1] % 2:  # the last column is the queries' factor
            own, scale = own[..., :-1], own[..., -1:] * scale
        kwargs["attention_bias"] = scale
        return super().forward(
            hidden_states,
            attention_mask,  # type: ignore[arg-type]
            *args,
            rotary_pos_emb=own,
            **kwargs,
        )


def window_masks(mask_BSP: Tensor, age_BSP: Tensor, windows: tuple[int | None, ...]) -> Tensor:
    """The masks [B, W, S, P] of layers with these windows; True hides.

    Args:
        mask_BSP: the mask of a layer without a window.
        age_BSP: how many tokens each key is before each query; B may be 1.
    """
    if windows == (None,):
        return mask_BSP[:, None]
    rows = [mask_BSP if window is None else mask_BSP | (age_BSP >= window) for window in windows]
    return torch.stack(rows, dim=1)
