"""Batches for the training step: moved to the device, split into micro batches, or made from held-out sequences."""

# B sequences, S tokens of a sequence
from dataclasses import replace

import torch
from torch import Tensor

from minitron_train.data.stream import Batch

TENSORS = ("tokens_BS", "labels_BS", "mask_BS", "documents_BS")


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of the batch that are not None, by field name."""
    found = {name: getattr(batch, name) for name in TENSORS}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, **{name: tensor.to(device) for name, tensor in tensors(batch).items()})


def micro_batches(batch: Batch, num_rows: int) -> list[Batch]:
    """Split a rank's batch into micro batches of at most `num_rows` sequences."""
    cuts = {name: tensor.split(num_rows) for name, tensor in tensors(batch).items()}
    return [replace(batch, **{name: cut[k] for name, cut in cuts.items()}) for k in range(len(cuts["tokens_BS"]))]


def held_out_batch(rows: Tensor) -> Batch:
    """Turn held-out sequences into a batch: [B, S + 1] without masked tokens, or [B, 3, S + 1] with conversations (see
    data.stream.with_counts).
    """
    tokens, counts, documents = rows.unbind(1) if rows.dim() == 3 else (rows, None, None)
    inputs = tokens[:, :-1].contiguous()
    mask = torch.ones(inputs.shape, device=rows.device)
    if counts is not None and documents is not None:
        mask *= counts[:, 1:] * (documents[:, 1:] == documents[:, :-1])
    return Batch(
        tokens_BS=inputs,
        labels_BS=tokens[:, 1:].contiguous(),
        mask_BS=mask,
        documents_BS=None if documents is None else documents[:, :-1].contiguous(),
        sources={},
    )
