"""Converts Hugging Face tensors to megatron-core parameters and back, one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_train.arch.shape import Shape
from minitron_train.arch.table import Architecture, ParamSpec


class Source(Protocol):
    """Anything that returns tensors by name: a checkpoint folder (hf.HFFolder), a pruned view of one, random weights."""

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop) along `dim`."""
        ...


def pack(row: ParamSpec, parts: list[Tensor], num_kv_groups: int) -> Tensor:
    """Fuse Hugging Face parts (whole, or one rank's shards) into the megatron-core tensor, which holds `num_kv_groups`."""
    if len(parts) == 1:
        return parts[0]
    if not row.per_group:
        return torch.cat(parts)
    return torch.cat([part.unflatten(0, (num_kv_groups, -1)) for part in parts], dim=1).flatten(0, 1)


def unpack(row: ParamSpec, fused: Tensor, lengths: list[int], num_kv_groups: int) -> list[Tensor]:
    """Inverse of `pack`; `lengths` are the row counts of the parts."""
    if len(lengths) == 1:
        return [fused]
    if not row.per_group:
        return list(fused.split(lengths))
    parts = fused.unflatten(0, (num_kv_groups, -1)).split([length // num_kv_groups for length in lengths], dim=1)
    return [part.flatten(0, 1) for part in parts]


def read_shard(row: ParamSpec, i: int, shape: Shape, source: Source, rank: int, size: int) -> Tensor:
    """Read the megatron-core parameter that tensor-parallel rank `rank` of `size` holds, and only its rows.

    Where `size` does not divide the vocabulary, rows of zeros follow its last row.
    """
    dim = row.parallel_dim()
    parts = []
    for name, full in row.sizes(shape).items():
        if dim is None or size == 1:
            parts.append(source.read(name.format(i=i)))
        else:
            step = -(-full[dim] // size)
            part = source.read(name.format(i=i), dim, rank * step, min((rank + 1) * step, full[dim]))
            parts.append(F.pad(part, (0, 0, 0, step - len(part))) if dim == 0 and len(part) < step else part)
    return pack(row, parts, shape.num_query_groups // size)


def shards_to_parts(row: ParamSpec, shape: Shape, shards: list[Tensor]) -> dict[str, Tensor]:
    """Join all ranks' shards of one parameter and split them into Hugging Face tensors; names keep their `{i}`."""
    size, dim, sizes = len(shards), row.parallel_dim(), row.sizes(shape)
    if dim is None:
        shards, size = shards[:1], 1
    lengths = [full[0] // (size if dim == 0 else 1) for full in sizes.values()]
    cut = [unpack(row, shard, lengths, shape.num_query_groups // size) for shard in shards]
    joined = [torch.cat(list(pieces), dim=dim or 0) if size > 1 else pieces[0] for pieces in zip(*cut, strict=True)]
    # without the padding of the vocabulary
    real = [whole[: full[0]] for whole, full in zip(joined, sizes.values(), strict=True)]
    return dict(zip(row.hf, real, strict=True))


def export_tensors(
    table: Architecture, shape: Shape, shards: Callable[[ParamSpec, int], list[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor that the rows name; see `stored` for those that are written.

    Args:
        shards: takes a row and a layer, and returns the parameter's shards of all tensor-parallel ranks.
    """
    for row in table.rows_of(shape):
        for i in row.layers(shape):
            for name, part in shards_to_parts(row, shape, shards(row, i)).items():
                yield name.format(i=i), part.contiguous()


def stored(table: Architecture, shape: Shape, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors as the checkpoint stores them. Parts of one tensor must come one after the other, in order."""
    lasts = {list(parts)[-1]: name for name, parts in table.each_stored(shape)}
    parts: list[Tensor] = []
    for name, tensor in tensors:
        parts.append(tensor)
        if name in lasts:
            yield lasts[name], torch.cat(parts) if len(parts) > 1 else tensor
            parts = []
