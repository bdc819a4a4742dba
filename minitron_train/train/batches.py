"""Batches for the training step: moved to the device, split into micro batches, or made from held-out sequences."""

# B sequences, S tokens of a sequence
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minitron_train.data.stream import Batch
from minitron_train.parallel.groups import Groups

TENSORS = ("tokens_BS", "labels_BS", "mask_BS", "documents_BS", "numbers_B")


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


def held_out_batch(rows: Tensor, numbers_B: Tensor | None = None) -> Batch:
    """Turn held-out sequences into a batch: [B, S + 1] without masked tokens, or [B, 3, S + 1] with conversations (see
    data.stream.with_counts). `numbers_B` counts them among all held-out sequences.
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
        numbers_B=numbers_B,
    )


def held_out_batches(rows: Tensor, num_rows: int, groups: Groups) -> Iterator[Batch]:
    """Yield this data-parallel rank's share of the held-out sequences on the device, at most `num_rows` at a time.

    Every rank yields as many batches of the same sizes (Groups.even_parts). A sequence that fills up a batch has the number
    -1, and none of its tokens count.
    """
    for numbers, is_own_B in groups.even_parts(torch.arange(len(rows)), num_rows):
        batch = held_out_batch(rows[numbers.cpu()].to(groups.device), numbers.where(is_own_B, -1))
        yield replace(batch, mask_BS=batch.mask_BS * is_own_B[:, None])
