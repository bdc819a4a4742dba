"""Slicing: copies the kept rows and columns of every tensor from one Hugging Face folder to another.

A few threads read, slice and write blocks of rows. Memory is a few blocks, whatever the model's size, and dropped rows
are not read.
"""

import itertools
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_train import hf
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import EMBEDDING, FINAL_NORM, READ_NORMS, Axes, stacked
from minitron_train.config import Merge
from minitron_train.pruning.basis import Basis
from minitron_train.pruning.select import ALONE, Keep, spread
from minitron_train.pruning.shards import ITEM_BYTES, RowReader, RowWriter
from minitron_train.runtime.errors import UserError

BLOCK_BYTES = 16 * 2**20  # bytes of a block that one thread reads
VOCABULARY_ROWS = 4096  # rows of a block of the vocabulary's matrices
NUM_THREADS = max(2, min(8, len(os.sched_getaffinity(0))))


@dataclass(frozen=True, slots=True)
class Origin:
    """The teacher's tensor from which a tensor of the student is made."""

    name: str  # the teacher's tensor
    layer: int  # the teacher's layer
    axes: Axes
    mcore: str  # the row of arch/'s table, with `{e}` where it is one of an expert
    expert: int | None = None  # the student's expert


def origins(teacher: hf.HFFolder, keep: Keep) -> dict[str, Origin]:
    """The origin of every tensor of the student, by its name."""
    found = {}
    for row in teacher.table.templates_of(keep.student):
        experts = range(keep.student.num_moe_experts) if row.per_expert else [None]
        for i, expert in itertools.product(row.layers(keep.student), experts):
            layer = int(keep.layers[i])
            before = None if expert is None else int(keep.experts[layer][expert])
            for name, axes in row.hf.items():
                origin = Origin(name.format(i=layer, e=before), layer, axes, row.mcore, expert)
                found[name.format(i=i, e=expert)] = origin
    return found


class Sliced:
    """The student as a view of its teacher: a RowSource (see pruning.layers) that slices a tensor when it is read."""

    def __init__(self, teacher: hf.HFFolder, keep: Keep) -> None:
        self.source, self.keep, self.origins = RowReader(teacher), keep, origins(teacher, keep)
        scales = (teacher.table.embedding_scale(shape) for shape in (keep.teacher, keep.student))
        self.embedding_ratio = operator.truediv(*scales)
        self.gains: dict[tuple[str, int], Tensor] = {}  # by norm and layer, see _gain

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The student's tensor `name`, or its rows [start, stop) along `dim`."""
        origin = self.origins[name]
        if dim == 0 and self._shares_rows(origin):
            return self._cut(self.source.read(origin.name, 0, start, stop), origin)
        tensor = self._cut(self.source.read(origin.name), origin)
        return tensor if dim is None else tensor.narrow(dim, start, (stop or tensor.shape[dim]) - start)

    def rows(self, name: str, index_N: Tensor) -> Tensor:
        """Rows `index_N` (ascending) of a tensor that keeps all of the teacher's rows, such as the embedding."""
        origin = self.origins[name]
        assert self._shares_rows(origin), name
        return self._cut(self.source.rows(origin.name, index_N), origin)

    def _shares_rows(self, origin: Origin) -> bool:
        """Whether each of the student's rows is made from the teacher's row at the same position."""
        mixed = self.is_rotated(origin) and origin.axes[0] == "embd"
        return self.keep.rows(origin.axes[0], origin.layer, origin.expert) is None and not mixed

    def _cut(self, whole: Tensor, origin: Origin) -> Tensor:
        """Make the student's tensor from the teacher's, or rows of it from the teacher's rows."""
        kept = [self.keep.rows(axis, origin.layer, origin.expert) for axis in origin.axes]
        tensor = whole
        for axis, index in enumerate(kept):
            tensor = tensor if index is None else tensor.index_select(axis, index)
        if self.is_merged(origin):
            tensor = self._merge(tensor, whole, origin, kept)
        tensor = self._rotate(tensor.float(), origin) if self.is_rotated(origin) else tensor
        return self._rescale(tensor.float(), origin) if self.is_rescaled(origin) else tensor

    def is_changed(self, origin: Origin) -> bool:
        """Whether the student's tensor holds other numbers than the teacher's rows and columns."""
        return self.is_merged(origin) or self.is_rotated(origin) or self.is_rescaled(origin)

    def is_merged(self, origin: Origin) -> bool:
        """Whether dropped heads are merged into kept ones in this tensor."""
        if self.keep.merge is Merge.none or "q" not in origin.axes:
            return False
        return (origin.axes[0] == "q") == (self.keep.merge is Merge.queries)

    def _merge(self, tensor: Tensor, whole: Tensor, origin: Origin, kept: list[Tensor | None]) -> Tensor:
        """Head residual merge (arXiv 2407.14679 §2.2): q_i + (q_i - q_j), or o_i + o_j."""
        axis, partners = origin.axes.index("q"), self.keep.partners[origin.layer]
        paired = partners != ALONE
        size = self.keep.teacher.kv_channels
        taken = whole.index_select(axis, spread(partners[paired], size))
        for other, index in enumerate(kept):
            taken = taken if other == axis or index is None else taken.index_select(other, index)
        places = spread(paired.nonzero().flatten(), size)
        own = tensor.index_select(axis, places)
        merged = own + (own - taken) if self.keep.merge is Merge.queries else own + taken
        return tensor.index_copy(axis, places, merged)

    def is_rescaled(self, origin: Origin) -> bool:
        """Whether this tensor makes up for a factor of the embeddings that depends on the hidden size."""
        tied = self.keep.student.tie_embeddings
        return self.embedding_ratio != 1 and (origin.mcore == EMBEDDING or (tied and origin.mcore == FINAL_NORM))

    def _rescale(self, tensor: Tensor, origin: Origin) -> Tensor:
        """Multiply the embedding by the ratio of the factors. A tied output layer gets it too: the last norm divides by it."""
        if origin.mcore == EMBEDDING:
            return tensor * self.embedding_ratio
        return (tensor + self._offset) / self.embedding_ratio - self._offset

    def is_rotated(self, origin: Origin) -> bool:
        """Whether this tensor has an axis along a rotated residual stream."""
        return self.keep.basis is not None and "embd" in origin.axes

    def _rotate(self, tensor: Tensor, origin: Origin) -> Tensor:
        """Transform to the student's basis (see pruning.basis); a norm's weights are folded into the linear after it."""
        basis, axes = self.keep.basis, origin.axes
        assert basis is not None
        if origin.mcore == EMBEDDING:
            return tensor @ basis.down_DH
        if axes == ("embd",) and "layernorm" not in origin.mcore:
            return tensor @ basis.down_DH  # the bias of a linear that writes to the stream
        if axes == ("embd",):
            return self._rotate_norm(tensor, origin, basis)
        if axes[0] == "embd":
            return basis.down_DH.t() @ tensor
        return self._folded(tensor, origin) / self._gain(READ_NORMS[origin.mcore], origin.layer)

    def _folded(self, tensor: Tensor, origin: Origin) -> Tensor:
        """A linear with the weights of the norm before it folded in."""
        basis = self.keep.basis
        assert basis is not None
        return (tensor * self._gamma(READ_NORMS[origin.mcore] + ".weight", origin.layer)) @ basis.up_DH

    def _gain(self, norm: str, layer: int) -> Tensor:
        """Weights of a norm, [H], that give the columns of the linears after it equal sizes.

        The model's output would be the same with ones. But AdamW changes all weights by about the same amount, and a
        direction that is large in the stream has a small column in the linears. Without these weights, training diverges.
        """
        if "{i}" not in norm:
            return torch.ones(self.keep.student.hidden_size)
        if (norm, layer) not in self.gains:
            squares, own, count = torch.zeros(self.keep.student.hidden_size), 0.0, 0
            for origin in self.origins.values():
                if origin.layer == layer and READ_NORMS.get(origin.mcore) == norm:
                    tensor = self.source.read(origin.name).float()
                    squares += self._folded(tensor, origin).square().sum(0)
                    own, count = own + tensor.square().mean(1).sum().item(), count + len(tensor)
            self.gains[norm, layer] = (squares / count).sqrt().clamp(min=1e-6) / (own / count) ** 0.5
        return self.gains[norm, layer]

    def _rotate_norm(self, tensor: Tensor, origin: Origin, basis: Basis) -> Tensor:
        last = "{i}" not in origin.mcore
        norm = origin.mcore.rsplit(".", 1)[0]
        gain_H = self._gain(norm, origin.layer)
        if origin.mcore.endswith(".bias"):
            gamma = self._gamma(f"{norm}.weight", origin.layer)
            return torch.where(gamma == 0, 0, tensor / gamma) @ basis.up_DH * gain_H  # see basis.why_not
        return (basis.final_norm_H if last else basis.norm * gain_H) - self._offset

    @property
    def _offset(self) -> float:
        """The constant that a norm adds to its stored weights."""
        return float(self.source.checkpoint.table.transformer["layernorm_zero_centered_gamma"])

    def _gamma(self, mcore: str, layer: int) -> Tensor:
        """Effective weights of one of the teacher's norms."""
        row = next(row for row in self.source.checkpoint.table.rows if row.mcore == mcore)
        return self.source.read(next(iter(row.hf)).format(i=layer)).float() + self._offset


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of one tensor: the unit of work."""

    name: str
    origin: Origin
    first_row: int  # in the student's tensor
    rows: np.ndarray  # in the teacher's tensor
    columns: np.ndarray | None


def blocks(teacher: hf.HFFolder, keep: Keep, names: Mapping[str, Origin]) -> Iterator[Block]:
    """Yield blocks of rows; each reads about BLOCK_BYTES."""
    for name, origin in names.items():
        size = teacher.sizes[origin.name]
        kept = [keep.rows(axis, origin.layer, origin.expert) for axis in origin.axes]
        rows = np.arange(size[0]) if kept[0] is None else kept[0].numpy()
        columns = kept[1].numpy() if len(kept) > 1 and kept[1] is not None else None
        step = max(1, BLOCK_BYTES // (prod(size[1:]) * ITEM_BYTES[teacher.dtypes[origin.name]]))
        for start in range(0, len(rows), step):
            yield Block(name, origin, start, rows[start : start + step], columns)


def copy_block(block: Block, reader: RowReader, writer: RowWriter, dtype: str) -> None:
    """Read, slice and write one block."""
    item = {8: np.uint64, 4: np.uint32, 2: np.uint16}[ITEM_BYTES[dtype]]  # bits are copied, never interpreted
    raw = np.empty((len(block.rows), reader.row_bytes(block.origin.name)), np.uint8)
    reader.read_rows(block.origin.name, block.rows, raw)
    values = raw.view(item)
    if block.columns is not None:
        cut = np.empty((len(values), len(block.columns)), item)
        values = np.take(values, block.columns, axis=1, out=cut, mode="clip")  # clip skips the bounds check
    writer.write(block.name, block.first_row, values)


def slice_checkpoint(
    teacher: hf.HFFolder, keep: Keep, student: Shape, folder: Path, replaced: Iterable[tuple[str, Tensor]] = ()
) -> dict[str, Any]:
    """Write the student's Hugging Face folder, with kept.safetensors, into the empty `folder`.

    Args:
        replaced: repaired tensors, which are not sliced from the teacher: whole, or in blocks of rows in order.

    Returns:
        Facts for the stage's provenance.
    """
    found = origins(teacher, keep)
    sizes = teacher.table.tensors(student)
    types = {name: teacher.dtypes[origin.name] for name, origin in found.items()}
    dtypes = {name: hf.STORED_DTYPES[stored] for name, stored in types.items()}
    parts = {teacher.written_name(name): held for name, held in teacher.table.each_stored(student)}
    layout = {name: (types[next(iter(held))], stacked(held)) for name, held in parts.items()}
    writers = writers_around(teacher, keep)
    sizes_around = {
        name: (student.hidden_size, *entry.size[1:]) if name in writers else entry.size
        for name, entry in teacher.rest.items()
    }
    layout |= {name: (entry.dtype, sizes_around[name]) for name, entry in teacher.rest.items()}
    reader, view = RowReader(teacher), Sliced(teacher, keep)
    with RowWriter(folder, layout, parts=parts) as writer:
        num_replaced: Counter[str] = Counter()
        for name, rows in replaced:
            assert rows.shape[1:] == sizes[name][1:], f"{name}: {tuple(rows.shape)} repaired, {sizes[name]} planned"
            write_tensor(writer, name, num_replaced[name], rows, dtypes[name])
            num_replaced[name] += len(rows)
        for name, num_rows in num_replaced.items():
            assert num_rows == sizes[name][0], f"{name}: {num_rows} rows repaired, {sizes[name]} planned"
            del found[name]
        for name in [name for name, origin in found.items() if view.is_changed(origin)]:
            step = VOCABULARY_ROWS if found.pop(name).axes[0] == "vocab" else sizes[name][0]
            for start in range(0, sizes[name][0], step):
                stop = min(start + step, sizes[name][0])
                write_tensor(writer, name, start, view.read(name, 0, start, stop), dtypes[name])
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            jobs = blocks(teacher, keep, found)
            for _ in pool.map(lambda block: copy_block(block, reader, writer, types[block.name]), jobs):
                pass
        for name, entry in teacher.rest.items():
            if name in writers:
                write_tensor(writer, name, 0, narrow(hf.values(entry), keep), hf.STORED_DTYPES[entry.dtype])
            else:
                writer.write(name, 0, hf.values(entry).flatten().view(torch.uint8).numpy())
    config = hf.student_config(teacher.config, student, layers=keep.layers.tolist())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    hf.copy_tokenizer(teacher.folder, folder)
    keep.write(folder)
    return {"parameters": check_parameters(hf.HFFolder(folder), student)}


def writers_around(teacher: hf.HFFolder, keep: Keep) -> frozenset[str]:
    """Stored names of the tensors outside the text model whose rows must be cut with its hidden size; none if it stays.

    Raises:
        UserError: the folder lacks them.
    """
    if teacher.wrapper is None or keep.student.hidden_size == keep.teacher.hidden_size:
        return frozenset()
    found = teacher.writers
    if not found:
        raise UserError(
            f"{teacher.folder}: no projector of image features, but {teacher.wrapper.name} adds image features to a stream of "
            f"{keep.teacher.hidden_size} channels; download the checkpoint again"
        )
    return found


def narrow(tensor: Tensor, keep: Keep) -> Tensor:
    """A tensor that writes to the residual stream, [D] or [D, …], reduced to the student's channels or directions."""
    if keep.basis is None:
        return tensor[keep.embedding]
    return keep.basis.down_DH.t() @ tensor.float()


def write_tensor(writer: RowWriter, name: str, first_row: int, tensor: Tensor, dtype: torch.dtype) -> None:
    """Write rows of one tensor in the checkpoint's dtype.

    Raises:
        UserError: a value is out of the dtype's range.
    """
    remedy = "convert the teacher to bfloat16 or float32 first"
    stored = hf.cast(tensor.cpu(), dtype, f"tensor {name} of the pruned model", remedy)
    writer.write(name, first_row, stored.contiguous().view(torch.uint8).numpy())


def check_parameters(written: hf.HFFolder, student: Shape) -> int:
    """Number of parameters in the written folder; an assertion error if it is not the planned one."""
    assert not written.unexpected, f"{written.folder}: holds {written.unexpected[0]}, which the student does not have"
    planned = sum(written.table.parameters(student).values())
    actual = sum(prod(size) for size in written.sizes.values())
    assert actual == planned, f"{written.folder}: {actual:,} parameters written, {planned:,} planned"
    return actual
