"""Greedy decoding and sampling with a key/value cache, at any tensor-parallel size."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron_train.model.build import LanguageModel
from minitron_train.model.forward import KeyValueCache, hidden_states, inference
from minitron_train.model.vocabulary import OutputLayer
from minitron_train.parallel.groups import Groups

# B unfinished texts, S prompt length with padding, P cached tokens, H hidden, V vocab (local shard), W whole vocab


def greedy(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    is_finished: Sequence[Callable[[list[int]], bool]],
    groups: Groups,
) -> list[list[int]]:
    """Continue each prompt with the most probable next token until it is finished.

    Prompts of unequal length are padded on the right. No token attends to padding, so a text does not depend on the others.

    Args:
        max_new_tokens: a text ends after this many tokens at the latest.
        is_finished: one function per prompt; takes its new tokens and returns whether they end the text.

    Returns:
        New tokens of each prompt, including the one that finished it.

    Raises:
        FloatingPointError: logits are not finite.
    """
    assert all(prompts), "an empty prompt has no last token to continue from"
    device = groups.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    places = torch.arange(tokens.shape[1], device=device)
    texts: list[list[int]] = [[] for _ in prompts]
    growing = torch.arange(len(prompts), device=device)
    cache = KeyValueCache()
    with inference(model):
        positions_BS = torch.minimum(places, lengths[:, None] - 1)  # of padding: its text's length decides the angles
        hidden_BSH = hidden_states(model, tokens, positions_BS, cache=cache, keep=True)
        hidden_BH = hidden_BSH[growing, lengths - 1]
        hidden_keys_BP = places >= lengths[:, None]
        for step in range(max_new_tokens):
            next_B = most_probable(hidden_BH, model.output, groups)
            for row, token in zip(growing.tolist(), next_B.tolist(), strict=True):
                texts[row].append(token)
            going = [k for k, row in enumerate(growing.tolist()) if not is_finished[row](texts[row])]
            if not going or step == max_new_tokens - 1:
                break
            if len(going) < len(growing):
                rows = torch.tensor(going, device=device)
                cache.keep_rows(rows)
                growing, next_B, hidden_keys_BP = growing[rows], next_B[rows], hidden_keys_BP[rows]
            hidden_keys_BP = torch.nn.functional.pad(hidden_keys_BP, (0, 1), value=False)
            positions_B1 = (lengths[growing] + step)[:, None]
            hidden_keys_B1P = hidden_keys_BP[:, None]
            hidden_BH = hidden_states(model, next_B[:, None], positions_B1, hidden_keys_B1P, cache, keep=True)[:, 0]
    return texts


def sample(
    model: LanguageModel, prompt: list[int], num_texts: int, length: int, generator: torch.Generator, groups: Groups
) -> Iterator[Tensor]:
    """Sample continuations of `prompt` at temperature 1: yields the next token of each text, int64 [B], `length` times.

    Call it inside `inference`. The token with the largest sum of logit and Gumbel noise is a sample from the softmax.
    Every rank draws the noise of the whole vocabulary and uses its part, so the number of ranks changes rounding alone.

    Raises:
        FloatingPointError: logits are not finite.
    """
    device, num_rows = groups.device, model.output.num_rows
    next_BS = torch.tensor([prompt] * num_texts, device=device)
    noise_BV = torch.empty(num_texts, model.real_vocab_size, device=device)
    padding = (0, num_rows * groups.tp_size - model.real_vocab_size)
    part = slice(groups.tp_rank * num_rows, (groups.tp_rank + 1) * num_rows)
    cache = KeyValueCache()
    for _ in range(length):
        first, stop = cache.num_tokens, cache.num_tokens + next_BS.shape[1]
        positions_BS = torch.arange(first, stop, device=device).expand_as(next_BS)
        hidden_BH = hidden_states(model, next_BS, positions_BS, cache=cache, keep=True)[:, -1]
        noise_BV.exponential_(generator=generator).clamp_(min=torch.finfo(noise_BV.dtype).tiny).log_().neg_()
        next_B = most_probable(hidden_BH, model.output, groups, F.pad(noise_BV, padding)[:, part])
        yield next_B
        next_BS = next_B[:, None]


def most_probable(hidden_BH: Tensor, output: OutputLayer, groups: Groups, added_BV: Tensor | None = None) -> Tensor:
    """The token with the largest logit (plus `added_BV`), int64 [B], the same on every rank. The first of equal ones wins."""
    logits_BV = output.logits(hidden_BH)
    peaks_B, tokens_B = (logits_BV if added_BV is None else logits_BV + added_BV).max(dim=1)
    if groups.tp_size == 1:
        require_finite(peaks_B)
        return tokens_B
    tokens_B += groups.tp_rank * output.num_rows
    all_peaks = torch.stack(groups.gather(peaks_B))
    require_finite(all_peaks)
    best = all_peaks.argmax(dim=0)  # ranks hold the vocabulary in order
    chosen_B = torch.stack(groups.gather(tokens_B)).gather(0, best[None])[0]
    dist.broadcast(chosen_B, dist.get_global_rank(groups.tp_group, 0), group=groups.tp_group)
    return chosen_B


def require_finite(peaks: Tensor) -> None:
    """Raise FloatingPointError unless all largest logits are finite."""
    if not peaks.isfinite().all():
        raise FloatingPointError("logits are not finite")
