"""Reads stored tensors, whole or by rows, with plain reads at offsets.

Files are not memory-mapped, so their pages do not count as this process's memory.
"""

import os
import weakref
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minitron_train.hf.dtypes import STORED_DTYPES, cast
from minitron_train.hf.headers import ITEM_BITS, Entry
from minitron_train.hf.locate import removed_files
from minitron_train.runtime.errors import UserError

if TYPE_CHECKING:
    from minitron_train.hf.weights import HFFolder

COMPARED_VALUES = 2**21  # values of a block in a comparison


class RowReader:
    """Reads the tensors of a Hugging Face folder without caching: a RowSource (see pruning.layers)."""

    def __init__(self, checkpoint: "HFFolder") -> None:
        self.checkpoint = checkpoint
        self.files: dict[Path, int] = {}
        weakref.finalize(self, close_all, self.files)
        for file in sorted({entry.file for entry in checkpoint.stored.values()}):
            with removed_files(file):
                self.files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its rows [start, stop) along `dim` (0 or 1); float64 is read as float32.

        Raises:
            UserError: a value of a float64 tensor is out of the range of float32.
        """
        size = self.checkpoint.sizes[name]
        first, last = (start, size[0] if stop is None else stop) if dim == 0 else (0, size[0])
        tensor = self.rows(name, torch.arange(first, last))
        return tensor[:, start:stop] if dim == 1 else tensor

    def rows(self, name: str, index_N: Tensor) -> Tensor:
        """Rows `index_N` (ascending) of the tensor; float64 is read as float32 (see `read`)."""
        entry = self.checkpoint.stored[name]
        tensor = torch.empty(len(index_N), *entry.size[1:], dtype=STORED_DTYPES[entry.dtype])
        self.read_rows(name, index_N.numpy(), tensor.view(len(index_N), -1).view(torch.uint8).numpy())
        if tensor.dtype != torch.float64:
            return tensor
        return cast(tensor, torch.float32, f"{entry.file}: tensor {entry.name}", "use another teacher")

    def read_rows(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Read `rows` (ascending) of tensor `name` into `out`, uint8 [rows, row_bytes], bit for bit. Thread-safe.

        Consecutive rows are read in one call.
        """
        entry, width = self.checkpoint.stored[name], self.row_bytes(name)
        for first, last in runs(rows):
            view = memoryview(out[first:last].data).cast("B")
            read_at(self.files[entry.file], entry, entry.start + int(rows[first]) * width, view)

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of tensor `name`."""
        entry = self.checkpoint.stored[name]
        return prod(entry.size[1:]) * ITEM_BITS[entry.dtype] // 8


def read_at(file: int, entry: Entry, offset: int, view: memoryview) -> None:
    """Fill `view` from byte `offset` of the open `file`; `entry` is named if the file is too short."""
    while view:  # a single call reads at most 2 GiB and may be cut short
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise UserError(f"{entry.file}: ends inside tensor {entry.name}; it was changed while it was read")
        view, offset = view[count:], offset + count


def runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Bounds of the runs of consecutive numbers in ascending `rows`: [3, 4, 7] gives (0, 2), (2, 3)."""
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    return zip([0, *breaks], [*breaks, len(rows)], strict=True)


def close_all(files: dict[Path, int]) -> None:
    """Close file descriptors."""
    for file in files.values():
        os.close(file)


def have_equal_values(first: Entry, second: Entry) -> bool:
    """Whether two stored tensors are equal; they are read in blocks, up to the first difference."""
    if first.size != second.size or not {first.dtype, second.dtype} <= STORED_DTYPES.keys():
        return False
    for start in range(0, prod(first.size), COMPARED_VALUES):
        count = min(COMPARED_VALUES, prod(first.size) - start)
        one, other = values_of(first, start, count), values_of(second, start, count)
        wide = torch.promote_types(one.dtype, other.dtype)
        if not torch.equal(one.to(wide), other.to(wide)):
            return False
    return True


def values_of(entry: Entry, start: int, count: int) -> Tensor:
    """`count` values of a stored tensor, starting at value `start`, flat."""
    values = torch.empty(count, dtype=STORED_DTYPES[entry.dtype])
    with removed_files(entry.file):
        file = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        view = memoryview(values.view(torch.uint8).numpy().data).cast("B")
        read_at(file, entry, entry.start + start * values.itemsize, view)
    finally:
        os.close(file)
    return values
