"""Inference passes with explicit positions, masks and a key/value cache.

They work on the LanguageModel that is trained, at any tensor-parallel size, and leave the model unchanged.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from minitron_train.model.attention import window_masks
from minitron_train.model.build import LanguageModel
from minitron_train.model.vocabulary import OutputLayer
from minitron_train.runtime.errors import UserError

# B batch, S tokens of one row, P tokens in the cache, H hidden, N positions, V vocab (local shard)
# G KV groups held, D channels per head

LOGIT_BYTES = 128 * 2**20  # largest block of logits held at once
SPARE_TOKENS = 64  # room for further tokens, so that most steps of a generated text copy no cache


@dataclass
class Grown:
    """Keys or values of the first `num_tokens` tokens, in a tensor with room for more, [B, G, capacity, D]."""

    tensor_BGCD: Tensor
    num_tokens: int

    @property
    def tokens_PBGD(self) -> Tensor:
        """A view of the tokens."""
        return self.tensor_BGCD[:, :, : self.num_tokens].permute(2, 0, 1, 3)

    def append(self, new_SBGD: Tensor) -> None:
        """Add tokens; a cache of batch size 1 takes the batch size of the new tokens."""
        old_PBGD, length = self.tokens_PBGD, self.num_tokens + len(new_SBGD)
        if length > self.tensor_BGCD.shape[2] or len(self.tensor_BGCD) != new_SBGD.shape[1]:
            _, batch, groups, channels = new_SBGD.shape
            self.tensor_BGCD = new_SBGD.new_empty(batch, groups, length + SPARE_TOKENS, channels)
            self.tensor_BGCD[:, :, : self.num_tokens].permute(2, 0, 1, 3).copy_(old_PBGD)
        self.tensor_BGCD[:, :, self.num_tokens : length].permute(2, 0, 1, 3).copy_(new_SBGD)
        self.num_tokens = length


class KeyValueCache:
    """Keys and values of every layer, for tokens that later tokens attend to.

    They are recorded at the input of the core attention, after the rotary embedding, so the order of keys does not matter.
    """

    def __init__(self) -> None:
        self.layers: dict[torch.nn.Module, tuple[Grown, Grown]] = {}  # keys and values
        self.positions_BP = torch.empty(1, 0, dtype=torch.long)
        self.lengths_B = torch.zeros(1, dtype=torch.long)  # of the texts, when the tokens were computed

    @property
    def num_tokens(self) -> int:
        """Number of cached tokens, P."""
        return next(iter(self.layers.values()))[0].num_tokens if self.layers else 0

    @contextlib.contextmanager
    def attached(self, model: LanguageModel, keep: bool) -> Iterator[None]:
        """Let the model's tokens attend to the cached tokens during a block; `keep` adds the new tokens to the cache."""

        def extend(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            query, *new, mask = args
            if keep:
                if module not in self.layers:
                    key, value = (Grown(x[:0].permute(1, 2, 0, 3), 0) for x in new)
                    self.layers[module] = key, value
                for grown, x in zip(self.layers[module], new, strict=True):
                    grown.append(x)
                new = [grown.tokens_PBGD for grown in self.layers[module]]
            elif module in self.layers:
                old = (grown.tokens_PBGD.expand(-1, query.shape[1], -1, -1) for grown in self.layers[module])
                new = [torch.cat(pair) for pair in zip(old, new, strict=True)]
            return query, *new, mask

        attentions = [module for name, module in model.decoder.named_modules() if name.endswith(".core_attention")]
        hooks = [attention.register_forward_pre_hook(extend) for attention in attentions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def positions_with(self, positions_BS: Tensor) -> Tensor:
        """Positions of the cached tokens and of new ones after them, [B, P + S]."""
        old_BP = self.positions_BP.to(positions_BS.device).expand(len(positions_BS), -1)
        return torch.cat([old_BP, positions_BS], dim=1)

    def keep_tokens(self, num_tokens: int) -> None:
        """Drop all tokens but the first `num_tokens`."""
        self.positions_BP = self.positions_BP[:, :num_tokens]
        for grown in (grown for pair in self.layers.values() for grown in pair):
            grown.num_tokens = num_tokens

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all texts but those at `rows`."""
        self.positions_BP, self.lengths_B = self.positions_BP[rows], self.lengths_B[rows]
        for grown in (grown for pair in self.layers.values() for grown in pair):
            grown.tensor_BGCD = grown.tensor_BGCD[rows]


def hidden_states(
    model: LanguageModel,
    tokens_BS: Tensor,
    positions_BS: Tensor,
    hidden_mask_BSP: Tensor | None = None,
    cache: KeyValueCache | None = None,
    keep: bool = False,
    min_length: int = 0,
) -> Tensor:
    """Final hidden states [B, S, H] of tokens at given positions.

    Args:
        positions_BS: position of each token in its text, for the rotary embedding.
        hidden_mask_BSP: bool, True hides key P from query S, and cached keys come first; windows hide further keys by their
            positions. None is causal, and then the positions of cached and new tokens are consecutive.
        cache: earlier tokens that the new ones attend to; a cache of batch size 1 serves any batch size.
        keep: add the new tokens to the cache.
        min_length: the texts have at least this many tokens, where later calls continue them. LongRoPE depends on it.

    Raises:
        UserError: a text of the cache grows beyond the length at which its cached tokens would change.
    """
    cache = KeyValueCache() if cache is None else cache
    num_tokens = tokens_BS.shape[1]
    num_keys = cache.num_tokens + num_tokens
    if model.config.sequence_parallel:  # the ranks must get equal parts of the sequence
        padding = (0, -num_tokens % model.config.tensor_model_parallel_size)  # on the right
        tokens_BS, positions_BS = F.pad(tokens_BS, padding), F.pad(positions_BS, padding)
        if hidden_mask_BSP is not None:  # padding attends to all tokens: a row that attends to none would be NaN
            hidden_mask_BSP = F.pad(F.pad(hidden_mask_BSP, padding, value=True), (0, 0, *padding), value=False)
    key_positions_BP, masks_BWSP = cache.positions_with(positions_BS), None
    lengths_B = (positions_BS.amax(1) + 1).clamp(min=min_length)
    check_switch(model, cache, lengths_B)
    if hidden_mask_BSP is not None:
        ages_BSP = positions_BS[:, :, None] - key_positions_BP[:, None]
        masks_BWSP = window_masks(hidden_mask_BSP, ages_BSP, model.windows)
    with cache.attached(model, keep):
        hidden_SBH = model.decoder(
            hidden_states=model.embed(tokens_BS),
            attention_mask=masks_BWSP,
            rotary_pos_emb=model.rotary_pos_emb.at(positions_BS, lengths_B),
        )
    if keep:
        cache.positions_BP, cache.lengths_B = key_positions_BP, lengths_B
        cache.keep_tokens(num_keys)
    if model.config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
    return hidden_SBH[:num_tokens].transpose(0, 1)


def check_switch(model: LanguageModel, cache: KeyValueCache, lengths_B: Tensor) -> None:
    """Reject texts that grow beyond a length at which the angles of all their tokens change."""
    for switch in model.rotary_pos_emb.switch if cache.num_tokens else ():
        if ((cache.lengths_B.to(lengths_B.device) <= switch) & (lengths_B > switch)).any():
            raise UserError(
                f"a text grows beyond {switch} tokens, where this model's rotary embedding (longrope) changes for all its "
                f"tokens, and cached ones cannot follow; use prompts and generated texts of together at most {switch} tokens"
            )


def target_logprobs(
    hidden_NH: Tensor, output: OutputLayer, targets_N: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Log-probability of one target per position, and whether it is the most probable token.

    Logits are computed in chunks. The tensor-parallel ranks exchange three numbers per position.

    Args:
        output: this rank's part of the output layer.
        group: the tensor-parallel group; None for a single rank.

    Returns:
        fp32 [N] and bool [N], the same on every rank of the group.
    """
    first = dist.get_rank(group) * output.num_rows if group is not None else 0
    logprobs, greedy = (
        torch.empty(len(hidden_NH), device=hidden_NH.device),
        torch.empty_like(targets_N, dtype=torch.bool),
    )
    chunk = max(1, LOGIT_BYTES // (4 * output.num_rows))
    for start in range(0, len(hidden_NH), chunk):
        part = slice(start, start + chunk)
        logits = output.logits(hidden_NH[part])
        local = targets_N[part] - first
        held = (local >= 0) & (local < logits.shape[1])
        target = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].where(held, 0.0)
        peak = logits.amax(dim=1)
        if group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        sums = torch.stack([logits.sub_(peak[:, None]).exp_().sum(dim=1), target])
        if group is not None:
            dist.all_reduce(sums, group=group)
        logprobs[part] = sums[1] - peak - sums[0].log()
        greedy[part] = sums[1] >= peak
    return logprobs, greedy


@contextlib.contextmanager
def inference(model: LanguageModel) -> Iterator[None]:
    """Disable gradients and dropout during a block, then restore the model's mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
