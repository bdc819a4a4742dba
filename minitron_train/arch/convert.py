"""Between Hugging Face tensors and megatron-core parameters, tensor by tensor: nothing holds a whole model twice."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from minitron_train.arch.shape import Shape
from minitron_train.arch.table import Architecture, ParamSpec


class Source(Protocol):
    """Where tensors come from: a checkpoint folder (hf.HFFolder), a pruned view of one, or a random initialisation."""

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop) along `dim`."""
        ...


def pack(row: ParamSpec, parts: list[Tensor], groups: int) -> Tensor:
    """Hugging Face parts (whole, or one rank's cut) -> the fused megatron-core tensor. `groups`: KV groups held."""
    if len(parts) == 1:
        return parts[0]
    if not row.per_group:
        return torch.cat(parts)
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def unpack(row: ParamSpec, fused: Tensor, lengths: list[int], groups: int) -> list[Tensor]:
    """Inverse of `pack`; `lengths` are the row counts of the parts."""
    if len(lengths) == 1:
        return [fused]
    if not row.per_group:
        return list(fused.split(lengths))
    parts = fused.unflatten(0, (groups, -1)).split([length // groups for length in lengths], dim=1)
    return [part.flatten(0, 1) for part in parts]


def read_shard(row: ParamSpec, i: int, shape: Shape, source: Source, rank: int, size: int) -> Tensor:
    """One tensor-parallel rank's megatron-core parameter, reading only the rows that this rank holds."""
    dim = row.parallel_dim()
    parts = []
    for name, full in row.sizes(shape).items():
        if dim is None or size == 1:
            parts.append(source.read(name.format(i=i)))
        else:
            step = full[dim] // size
            parts.append(source.read(name.format(i=i), dim, rank * step, (rank + 1) * step))
    return pack(row, parts, shape.num_query_groups // size)


def shards_to_parts(row: ParamSpec, shape: Shape, shards: list[Tensor]) -> dict[str, Tensor]:
    """All ranks' shards of one parameter -> its Hugging Face tensors, with `{i}` left in the names."""
    size, dim, sizes = len(shards), row.parallel_dim(), row.sizes(shape)
    if dim is None:
        shards, size = shards[:1], 1
    lengths = [full[0] // (size if dim == 0 else 1) for full in sizes.values()]
    cut = [unpack(row, shard, lengths, shape.num_query_groups // size) for shard in shards]
    joined = [torch.cat(list(pieces), dim=dim or 0) if size > 1 else pieces[0] for pieces in zip(*cut, strict=True)]
    return dict(zip(row.hf, joined, strict=True))


def export_tensors(
    table: Architecture, shape: Shape, shards: Callable[[ParamSpec, int], list[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the Hugging Face checkpoint, one after the other.

    Args:
        shards: of a row's parameter in a layer, from all tensor-parallel ranks.
    """
    for row in table.rows_of(shape):
        for i in row.layers(shape):
            for name, part in shards_to_parts(row, shape, shards(row, i)).items():
                yield name.format(i=i), part.contiguous()
