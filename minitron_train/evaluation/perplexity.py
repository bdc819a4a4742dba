"""Perplexity of a model on fixed token sequences."""

import math

import torch
from torch import Tensor

from minitron_train.distillation.step import attention_mask
from minitron_train.model.build import LanguageModel
from minitron_train.model.forward import hidden_states, inference, target_logprobs
from minitron_train.parallel.groups import Groups
from minitron_train.train.batches import held_out_batch

# B batch, S sequence, H hidden


def perplexity(model: LanguageModel, tokens: Tensor, groups: Groups, batch_size: int) -> float:
    """Return exp of the mean negative log-likelihood (natural logarithm) of the next token; collective.

    Args:
        tokens: int64 [sequences, S + 1]; each sequence's first S tokens predict its last S. With conversations,
            [sequences, 3, S + 1] (see data.stream.with_counts), of which only the tokens that count are predicted.
        batch_size: sequences per forward pass.

    Returns:
        The same number on every rank; infinity if it overflows, NaN without tokens.
    """
    if tokens.shape[0] == 0 or tokens.shape[-1] < 2:
        return math.nan
    total = torch.zeros(2, dtype=torch.float64, device=groups.device)
    with inference(model):
        for rows in groups.own_parts(tokens, batch_size):
            batch = held_out_batch(rows)
            valid = batch.mask_BS.flatten() != 0
            hidden = causal_hidden(model, batch.tokens_BS, batch.documents_BS)[valid]
            group = groups.tp_group if groups.tp_size > 1 else None
            logprobs, _ = target_logprobs(hidden, model.output, batch.labels_BS.flatten()[valid], group)
            total += torch.stack([logprobs.double().sum(), torch.tensor(float(len(logprobs)), device=groups.device)])
    nll = -(groups.sum_over_data(total)[0] / total[1]).item()
    return math.exp(nll) if nll < 700 else math.inf


def causal_hidden(model: LanguageModel, tokens_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """Return the final hidden states [B * S, H] of sequences with causal attention, limited to documents if they are given."""
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    mask = attention_mask(documents_BS)
    return hidden_states(model, tokens_BS, positions, None if mask is None else mask[:, 0]).flatten(0, 1)
