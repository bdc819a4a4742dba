"""Depth by perplexity: what the loss becomes without each layer (arXiv 2407.14679 §2.2, "PPL")."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_train.console import progress
from minitron_train.prune.layers import Layers, forward

# N sequences, B batch, S sequence, H hidden, L layers, T predicted tokens, V vocabulary (the rank's own)

LOGITS = 2**24  # fp32 logits held at once


@torch.no_grad()
def losses_without(layers: Layers, tokens_NS: Tensor, *, micro_batch_size: int, chunk_tokens: int) -> Tensor:
    """Mean next-token cross-entropy of the model without layer i, for every i, and last of the whole model.

    What comes before a dropped layer is computed once for all, so that L layers take about L²/2 layer passes. Every
    layer, and every block of the output layer's rows, is read once per chunk; `chunk_tokens` bounds the tokens of all
    L + 1 models together. All ranks call it with their own sequences; a negative token is padding and never counts.

    Returns:
        fp64 [L + 1], nats, over the sequences of all ranks.
    """
    depth, groups = layers.shape.num_layers, layers.groups
    sums = torch.zeros(depth + 2, dtype=torch.float64, device=groups.device)  # of losses; then the predicted tokens
    chunks = tokens_NS.split(max(1, chunk_tokens // ((depth + 1) * tokens_NS.shape[1])))
    walk = (i for chunk in chunks for i in add_chunk(layers, chunk.split(micro_batch_size), sums))
    for _ in progress(walk, "score: without each layer", len(chunks) * depth):
        pass
    groups.sum_over_data(sums)
    return sums[:-1] / sums[-1]


def add_chunk(layers: Layers, batches: tuple[Tensor, ...], sums: Tensor) -> Iterator[int]:
    """Add one chunk, [B, S] each; yields after every layer."""
    rotary = layers.rotary(batches[0].shape[1])
    whole = [layers.embed(batch) for batch in batches]
    without: list[list[Tensor]] = []  # without[i]: what the model without layer i makes of the batches
    for i in range(layers.shape.num_layers):
        layer = layers[i]
        without = [[forward(layer, x, rotary) for x in hidden] for hidden in without]
        without.append(whole)
        whole = [forward(layer, x, rotary) for x in whole]
        yield i
    wanted = [batch[:, 1:].t().to(sums.device) for batch in batches]
    predicted = [
        torch.cat([layers.final_norm(x)[:-1][want >= 0] for x, want in zip(hidden, wanted, strict=True)])
        for hidden in (*without, whole)
    ]
    targets_T = torch.cat([want[want >= 0] for want in wanted])
    sums[:-1] += cross_entropies(layers, predicted, targets_T)
    sums[-1] += len(targets_T)


def cross_entropies(layers: Layers, hidden: list[Tensor], targets_T: Tensor) -> Tensor:
    """Σ over tokens of the cross-entropy of each of `hidden`, [T, H] after the last norm; fp64.

    The vocabulary passes in blocks of rows: neither it nor the logits are held.
    """
    groups, size = layers.groups, layers.shape.vocab_size // layers.groups.tp_size
    first = groups.tp_rank * size
    step = max(1, LOGITS // max(1, len(targets_T)))
    log_sums = torch.full((len(hidden), len(targets_T)), -torch.inf, dtype=torch.float64, device=targets_T.device)
    chosen = torch.zeros_like(log_sums)  # the targets' logits, where this rank owns them
    for start in range(first, first + size, step):
        rows_VH = layers.output_rows(start, min(start + step, first + size))
        own = (targets_T >= start) & (targets_T < start + len(rows_VH))
        for k, x_TH in enumerate(hidden):
            logits_TV = (x_TH @ rows_VH.t()).float()
            log_sums[k] = torch.logaddexp(log_sums[k], logits_TV.logsumexp(-1).double())
            chosen[k, own] = logits_TV[own, targets_T[own] - start].double()
    log_sums = torch.stack(groups.gather(log_sums)).logsumexp(0)
    return (log_sums - torch.stack(groups.gather(chosen)).sum(0)).sum(1)
