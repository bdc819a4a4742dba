"""Safetensors files by rows: read only kept rows, write blocks in any order and by many threads.

Rows travel through plain reads and writes at offsets, never through a memory map: file pages stay the kernel's and do
not count as this process's memory. All sizes are known before the first byte is written, so that a disk without
room is noticed at the start.
"""

import json
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_train import hf
from minitron_train.files import disk_errors

ITEM_BYTES = {stored: dtype.itemsize for stored, dtype in hf.STORED_DTYPES.items()}
ALIGNMENT = 4096  # of the data in a written file


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's rows lie."""

    file: int  # file descriptor
    offset: int  # of the first byte
    row_bytes: int


class RowReader:
    """The tensors of a Hugging Face folder, by rows: a RowSource (see prune.layers) that leaves nothing behind in memory."""

    def __init__(self, checkpoint: hf.Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.places: dict[str, Place] = {}
        names = checkpoint.table.tensors(checkpoint.shape)  # a folder may hold others, of any type
        files: list[int] = []
        weakref.finalize(self, close_all, files)
        for path in sorted(set(checkpoint.files.values())):
            file = os.open(path, os.O_RDONLY)
            files.append(file)
            start = 8 + struct.unpack("<Q", os.pread(file, 8, 0))[0]
            header = hf.read_header(path)
            for name, entry in ((name, header[name]) for name in header.keys() & names):
                row_bytes = prod(entry["shape"][1:]) * ITEM_BYTES[entry["dtype"]]
                self.places[name] = Place(file, start + entry["data_offsets"][0], row_bytes)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its rows [start, stop) along `dim` (0 or 1)."""
        size = self.checkpoint.sizes[name]
        first, last = (start, size[0] if stop is None else stop) if dim == 0 else (0, size[0])
        tensor = self.rows(name, torch.arange(first, last))
        return tensor[:, start:stop] if dim == 1 else tensor

    def rows(self, name: str, index_N: Tensor) -> Tensor:
        """Rows `index_N` (ascending) of the tensor."""
        size, dtype = self.checkpoint.sizes[name], hf.STORED_DTYPES[self.checkpoint.dtypes[name]]
        tensor = torch.empty(len(index_N), *size[1:], dtype=dtype)
        self.read_rows(name, index_N.numpy(), tensor.view(len(index_N), -1).view(torch.uint8).numpy())
        return tensor

    def read_rows(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Read `rows` (ascending) of tensor `name` into `out`, uint8 [rows, row_bytes]; neighbours in one go. Thread-safe."""
        place = self.places[name]
        for first, last in runs(rows):
            view = memoryview(out[first:last].data).cast("B")
            offset = place.offset + int(rows[first]) * place.row_bytes
            while view:  # a single call reads at most 2 GiB and may be cut short
                count = os.preadv(place.file, [view], offset)
                assert count > 0, f"{name}: the file ends early"
                view, offset = view[count:], offset + count


def runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ends of the stretches of neighbours in ascending `rows`: [3, 4, 7] gives (0, 2), (2, 3)."""
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    return zip([0, *breaks], [*breaks, len(rows)], strict=True)


def close_all(files: list[int]) -> None:
    """Close file descriptors."""
    for file in files:
        os.close(file)


class RowWriter:
    """Tensors of a Hugging Face folder whose rows may be written in any order.

    Args:
        tensors: dtype (as safetensors spells it) and size of every tensor, in the order of the files.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        max_shard_bytes: int = hf.MAX_SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        self.files: list[int] = []
        shards = list(hf.in_shards(tensors.items(), lambda tensor: num_bytes(*tensor), max_shard_bytes))
        with disk_errors(folder):
            for name, shard in zip(hf.shard_names(len(shards)), shards, strict=True):
                self._lay_out(folder / name, shard)
            hf.write_index(folder, shards, sum(num_bytes(*tensor) for tensor in tensors.values()))

    def _lay_out(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Header, and room for all bytes of one file."""
        offsets, end = {}, 0
        for name, tensor in tensors.items():
            offsets[name], end = end, end + num_bytes(*tensor)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, size) in tensors.items():
            ends = [offsets[name], offsets[name] + num_bytes(dtype, size)]
            header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": ends}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.files.append(file)
        start = 8 + len(text)
        os.posix_fallocate(file, 0, start + end)
        os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
        for name, (dtype, size) in tensors.items():
            self.places[name] = Place(file, start + offsets[name], prod(size[1:]) * ITEM_BYTES[dtype])

    def write(self, name: str, first_row: int, rows: np.ndarray) -> None:
        """Write contiguous `rows`, any dtype, from row `first_row` of tensor `name` on. Thread-safe."""
        place, view = self.places[name], memoryview(rows.data).cast("B")
        offset = place.offset + first_row * place.row_bytes
        with disk_errors(self.folder):
            while view:
                count = os.pwrite(place.file, view, offset)
                view, offset = view[count:], offset + count

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        close_all(self.files)


def num_bytes(dtype: str, size: tuple[int, ...]) -> int:
    """Of one tensor."""
    return prod(size) * ITEM_BYTES[dtype]
