"""Writes safetensors files by rows, in any order and from many threads; hf.RowReader reads rows.

All sizes are known before the first byte is written, so a full disk is reported at the start.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from minitron_train import hf
from minitron_train.hf import RowReader, runs
from minitron_train.runtime.files import disk_errors

__all__ = ["ITEM_BYTES", "RowReader", "RowWriter", "runs"]

ITEM_BYTES = {stored: dtype.itemsize for stored, dtype in hf.STORED_DTYPES.items()}
ALIGNMENT = 4096  # bytes; tensor data start at a multiple of it


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a tensor in a file."""

    file: int  # file descriptor
    offset: int  # first byte
    row_bytes: int


class RowWriter:
    """Tensors of a Hugging Face folder whose rows may be written in any order.

    Args:
        tensors: dtype (as safetensors spells it) and size of every tensor, in the order of the files.
        parts: name and size of the ranges of rows of a tensor that are written under names of their own.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        max_shard_bytes: int = hf.MAX_SHARD_BYTES,
        parts: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        self.folder, self.parts = folder, parts or {}
        self.places: dict[str, Place] = {}
        self.files: list[int] = []
        shards = list(hf.in_shards(tensors.items(), lambda tensor: num_bytes(*tensor), max_shard_bytes))
        with disk_errors(folder):
            for name, shard in zip(hf.shard_names(len(shards)), shards, strict=True):
                self._lay_out(folder / name, shard)
            hf.write_index(folder, shards, sum(num_bytes(*tensor) for tensor in tensors.values()))

    def _lay_out(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Write one file's header and allocate all its bytes."""
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
            row_bytes, offset = prod(size[1:]) * ITEM_BYTES[dtype], start + offsets[name]
            for part, part_size in self.parts.get(name, {name: size}).items():
                self.places[part] = Place(file, offset, row_bytes)
                offset += prod(part_size[:1]) * row_bytes

    def write(self, name: str, first_row: int, rows: np.ndarray) -> None:
        """Write contiguous `rows`, of any dtype, starting at row `first_row` of tensor `name`. Thread-safe."""
        place, view = self.places[name], memoryview(rows.data).cast("B")
        offset = place.offset + first_row * place.row_bytes
        with disk_errors(self.folder):
            while view:
                count = os.pwrite(place.file, view, offset)
                view, offset = view[count:], offset + count

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files:
            os.close(file)


def num_bytes(dtype: str, size: tuple[int, ...]) -> int:
    """Bytes of one tensor."""
    return prod(size) * ITEM_BYTES[dtype]
