"""Evaluates the model without each of its layers: the loss, and the change of the logits.

The loss is "PPL" of arXiv 2407.14679 §2.2. The normalised squared change of the logits is that of arXiv 2511.16664.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_train.pruning.layers import Layers, forward
from minitron_train.runtime.console import progress

# N sequences, B batch, S sequence, H hidden, L layers, T predicted tokens, V vocabulary (local shard)

LOGITS = 2**24  # number of fp32 logits in one block


@dataclass(slots=True)
class Sums:
    """Sums over the tokens of one rank, fp64 [L + 1]: entry i is the model without layer i, the last the whole model."""

    losses: Tensor  # cross-entropies
    squares: Tensor  # squared differences of the logits to the whole model's; the last entry: its squared logits
    num_tokens: Tensor  # scalar


@torch.no_grad()
def without_each_layer(
    layers: Layers, tokens_NS: Tensor, *, micro_batch_size: int, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Run the model without layer i, for every i, and the whole model.

    The layers before a removed one are computed once for all models, so L layers take about L²/2 layer passes. Every layer,
    and every block of the output layer, is read once per chunk. `chunk_tokens` limits the tokens of all L + 1 models
    together. Every rank calls it with its own sequences. A negative token is padding and is ignored.

    Returns:
        Two tensors over the sequences of all ranks. Mean next-token cross-entropies, fp64 [L + 1], nats, the whole model's
        last. The relative change of the logits M, Σ (M - M_without)² / Σ M², fp64 [L].
    """
    depth, groups = layers.shape.num_layers, layers.groups

    def zeros(*size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.float64, device=groups.device)

    sums = Sums(zeros(depth + 1), zeros(depth + 1), zeros(1))
    chunks = tokens_NS.split(max(1, chunk_tokens // ((depth + 1) * tokens_NS.shape[1])))
    walk = (i for chunk in chunks for i in add_chunk(layers, chunk.split(micro_batch_size), sums))
    for _ in progress(walk, "score: without each layer", len(chunks) * depth):
        pass
    for total in (sums.losses, sums.squares, sums.num_tokens):
        groups.sum_over_data(total)
    return sums.losses / sums.num_tokens, sums.squares[:-1] / sums.squares[-1]


def add_chunk(layers: Layers, batches: tuple[Tensor, ...], sums: Sums) -> Iterator[int]:
    """Add one chunk of batches, [B, S] each; yields after every layer."""
    rotary = layers.rotary(batches[0].shape[1])
    whole = [layers.embed(batch) for batch in batches]
    without: list[list[Tensor]] = []  # without[i]: the batches' hidden states in the model without layer i
    for i in range(layers.shape.num_layers):
        layer = layers[i]
        without = [[forward(layer, x, rotary) for x in hidden] for hidden in without]
        without.append(whole)
        whole = [forward(layer, x, rotary) for x in whole]
        yield i
    wanted = [batch[:, 1:].t().to(sums.losses.device) for batch in batches]
    predicted = [
        torch.cat([layers.final_norm(x)[:-1][want >= 0] for x, want in zip(hidden, wanted, strict=True)])
        for hidden in (*without, whole)
    ]
    targets_T = torch.cat([want[want >= 0] for want in wanted])
    add_outputs(layers, predicted, targets_T, sums)
    sums.num_tokens += len(targets_T)


def add_outputs(layers: Layers, hidden: list[Tensor], targets_T: Tensor, sums: Sums) -> None:
    """Add losses and logit changes of every model in `hidden`, [T, H] each after the last norm; the whole model is last.

    The output layer is read in blocks of rows, so neither its weights nor all logits are held.
    """
    groups = layers.groups
    first = groups.tp_rank * layers.shape.rank_rows(groups.tp_size)
    last = first + layers.shape.real_rows(groups.tp_rank, groups.tp_size)
    step = max(1, LOGITS // max(1, len(targets_T)))
    log_sums = torch.full((len(hidden), len(targets_T)), -torch.inf, dtype=torch.float64, device=targets_T.device)
    chosen = torch.zeros_like(log_sums)  # the targets' logits, where this rank holds them
    squares = torch.zeros_like(sums.squares)
    for start in range(first, last, step):
        output = layers.output_layer(start, min(start + step, last))
        own = (targets_T >= start) & (targets_T < start + output.num_rows)
        whole_TV = output.logits(hidden[-1])
        for k, x_TH in enumerate(hidden):
            is_whole = k == len(hidden) - 1
            logits_TV = whole_TV if is_whole else output.logits(x_TH)
            log_sums[k] = torch.logaddexp(log_sums[k], logits_TV.logsumexp(-1).double())
            chosen[k, own] = logits_TV[own, targets_T[own] - start].double()
            change_TV = logits_TV if is_whole else logits_TV - whole_TV
            squares[k] += change_TV.square().sum(-1).double().sum()
    log_sums = torch.stack(groups.gather(log_sums)).logsumexp(0)
    sums.losses += (log_sums - torch.stack(groups.gather(chosen)).sum(0)).sum(1)
    sums.squares += torch.stack(groups.gather(squares)).sum(0)
