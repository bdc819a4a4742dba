"""Perplexity of a model on fixed token sequences."""

import math

import torch
from torch import Tensor

from minitron_train.model.build import LanguageModel
from minitron_train.model.forward import hidden_states, inference, target_logprobs
from minitron_train.parallel.groups import Groups

# B batch, S sequence, H hidden


def perplexity(model: LanguageModel, tokens: Tensor, groups: Groups, batch_size: int) -> float:
    """Return exp of the mean negative log-likelihood (natural logarithm) of the next token; collective.

    Args:
        tokens: int64 [sequences, S + 1]; each sequence's first S tokens predict its last S.
        batch_size: sequences per forward pass.

    Returns:
        The same number on every rank; infinity if it overflows, NaN without tokens.
    """
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        return math.nan
    total = torch.zeros(2, dtype=torch.float64, device=groups.device)
    with inference(model):
        for batch in groups.own_parts(tokens, batch_size):
            hidden = causal_hidden(model, batch[:, :-1])
            group = groups.tp_group if groups.tp_size > 1 else None
            logprobs, _ = target_logprobs(hidden, model.output, batch[:, 1:].flatten(), group)
            total += torch.stack([logprobs.double().sum(), torch.tensor(float(len(logprobs)), device=groups.device)])
    nll = -(groups.sum_over_data(total)[0] / total[1]).item()
    return math.exp(nll) if nll < 700 else math.inf


def causal_hidden(model: LanguageModel, tokens_BS: Tensor) -> Tensor:
    """Return the final hidden states [B * S, H] of sequences with causal attention."""
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return hidden_states(model, tokens_BS, positions).flatten(0, 1)
