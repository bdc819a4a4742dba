"""Log-likelihoods of token continuations, computed from packed rows."""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minitron_train.evaluation.packing import PackedRow, Request, plan, share
from minitron_train.model.build import LanguageModel
from minitron_train.model.forward import KeyValueCache, hidden_states, inference, target_logprobs
from minitron_train.parallel.groups import Groups

# B batch (rows), S longest row, P cached prefix, N scored positions, H hidden

Score = tuple[float, bool]  # natural log-likelihood, and whether greedy decoding would generate the continuation


def score(
    model: LanguageModel,
    requests: list[Request],
    groups: Groups,
    batch_tokens: int,
    on_scores: Callable[[dict[int, Score]], None],
) -> None:
    """Score this data-parallel rank's share of the requests.

    Args:
        batch_tokens: tokens of one forward pass, padding included.
        on_scores: called after each forward pass with request index -> score.
    """
    with inference(model):
        for min_length, together in by_length(requests, model.rotary_pos_emb.switch):
            for unit in share(plan(together, batch_tokens), groups.dp_rank, groups.dp_size):
                cache = KeyValueCache()
                if unit.prefix:
                    tokens = torch.tensor([unit.prefix], device=groups.device)
                    places = torch.arange(len(unit.prefix), device=groups.device)[None]
                    hidden_states(model, tokens, places, cache=cache, keep=True, min_length=min_length)
                for batch in unit.batches:
                    on_scores(score_rows(model, batch, cache, groups, min_length))


def by_length(requests: list[Request], switch: list[int]) -> list[tuple[int, list[Request]]]:
    """Requests whose tokens may be computed together, and the least length of their inputs.

    Args:
        switch: lengths, ascending, beyond which the model computes all tokens of a text differently.
    """
    groups: dict[int, list[Request]] = {}
    for request in requests:
        groups.setdefault(bisect_left(switch, len(request.inputs)), []).append(request)
    return [(switch[k - 1] + 1 if k else 0, together) for k, together in groups.items()]


def score_rows(
    model: LanguageModel, rows: list[PackedRow], cache: KeyValueCache, groups: Groups, min_length: int
) -> dict[int, Score]:
    """Score a batch in one forward pass. The output layer is applied only to scored positions."""
    device = groups.device
    tokens, positions, mask = (None if x is None else x.to(device) for x in to_tensors(rows, cache.num_tokens))
    assert tokens is not None and positions is not None
    hidden = hidden_states(model, tokens, positions, mask, cache, min_length=min_length)
    scored = [(b, *target) for b, row in enumerate(rows) for target in row.targets]
    row_N, place_N, target_N, _ = torch.tensor(scored, device=device).unbind(1)
    group = groups.tp_group if groups.tp_size > 1 else None
    logprobs, greedy = target_logprobs(hidden[row_N, place_N], model.output, target_N, group)
    parts: dict[int, list[Score]] = defaultdict(list)
    for (*_, index), logprob, is_greedy in zip(scored, logprobs.tolist(), greedy.tolist(), strict=True):
        parts[index].append((logprob, is_greedy))
    return {index: (math.fsum(x for x, _ in part), all(g for _, g in part)) for index, part in parts.items()}


def to_tensors(rows: list[PackedRow], num_prefix: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return tokens and positions [B, S], right-padded, and the mask [B, S, P + S]: True hides, None means causal."""
    longest = max(len(row.tokens) for row in rows)
    tokens, positions = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = torch.tensor(row.tokens)
        positions[b, : len(row.tokens)] = torch.tensor(row.depths) + num_prefix
    if num_prefix == 0 and all(row.is_chain for row in rows):
        return tokens, positions, None
    visible = np.stack([np.eye(longest, dtype=bool)] * len(rows))
    for b, row in enumerate(rows):
        for place, parent in enumerate(row.parents):
            if parent >= 0:
                visible[b, place] |= visible[b, parent]
    prefix = torch.ones(len(rows), longest, num_prefix, dtype=torch.bool)
    return tokens, positions, ~torch.cat([prefix, torch.from_numpy(visible)], dim=2)
