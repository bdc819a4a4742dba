"""Reads the header of a safetensors file and checks it as strictly as the safetensors library.

A header is not trusted: a damaged or hostile one is rejected before memory is allocated for the tensors it describes.
"""

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from safetensors import SafetensorError, safe_open

from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.records import Count, damaged, decode, open_file

ITEM_BITS = {  # bits of one value, for every type of the format
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_SHOWN = 100  # characters of a name in a message
LFS_MARK = b"version https://git-lfs"  # start of a Git LFS pointer, the text that replaces a large file


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor's entry in the header."""

    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=16)]
    data_offsets: tuple[Count, Count]  # from the end of the header


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored tensor's file, position, type and size."""

    file: Path
    name: str  # in the file
    dtype: str  # in safetensors' spelling
    size: tuple[int, ...]
    start: int  # first byte, counted from the beginning of the file
    num_bytes: int


def read_header(file: Path, remedy: str = "download it again") -> dict[str, Entry]:
    """Every tensor of one safetensors file by its name.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is not regular, truncated, damaged, or in another format; the message ends with `remedy`.
    """
    with open_file(file) as handle:
        refuse_pointer(file, handle)
        size = os.fstat(handle.fileno()).st_size
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file}: not a safetensors file, or cut off; {remedy}")
        text = handle.read(length)
    described = described_tensors(text, file, remedy)
    end = end_of_data(described, file, remedy)
    if size != 8 + length + end:
        raise UserError(f"{file}: {size:,} bytes, its header promises {8 + length + end:,}; {remedy}")
    check_with_library(file, remedy)
    return {
        name: Entry(file, name, one.dtype, one.shape, 8 + length + one.data_offsets[0], num_bytes(one))
        for name, one in described.items()
    }


def check_with_library(file: Path, remedy: str) -> None:
    """Reject what only the safetensors library rejects: a field given twice, values that do not end at a byte."""
    try:
        with safe_open(str(file), framework="np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file}: its header is corrupt ({first_line(error)}); {remedy}") from None


def described_tensors(text: bytes, file: Path, remedy: str) -> dict[str, Described]:
    """Decode the header's JSON; it may describe a million tensors."""
    where = f"{file}: its header is corrupt"
    raw = decode(text, dict[str, msgspec.Raw], where, remedy)
    if "__metadata__" in raw:
        decode(bytes(raw.pop("__metadata__")), dict[str, str], where, remedy)
    decoder = msgspec.json.Decoder(Described)
    try:
        return {name: decoder.decode(value) for name, value in raw.items()}
    except msgspec.MsgspecError as error:
        raise damaged(where, first_line(error), remedy) from None


def end_of_data(described: dict[str, Described], file: Path, remedy: str) -> int:
    """Total bytes of the tensors, which must be contiguous, and each as long as its type and size require.

    A tensor that is described twice leaves a gap, because JSON decoding drops one of the two descriptions.
    """
    position = 0
    for name, one in sorted(described.items(), key=lambda item: item[1].data_offsets):
        begin, end = one.data_offsets
        if one.dtype not in ITEM_BITS:
            raise UserError(
                f"{file}: its header is corrupt (tensor {shown(name)} has unknown type {shown(one.dtype)}); {remedy}"
            )
        if begin != position or end - begin != num_bytes(one):
            takes = f"{num_bytes(one):,}" if num_bytes(one) < 2**63 else "over 2**63"
            raise UserError(
                f"{file}: its header is corrupt (tensor {shown(name)} takes {takes} bytes and must begin at byte "
                f"{position:,}, its offsets are {begin:,} to {end:,}); {remedy}"
            )
        position = end
    return position


def num_bytes(one: Described) -> int:
    """Bytes that a tensor of this type and size takes."""
    return -(-prod(one.shape) * ITEM_BITS[one.dtype] // 8)


def shown(name: str) -> str:
    """A name from a file, made safe for a message: printable and at most MAX_SHOWN characters long."""
    short = name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "…"
    return short if short.isprintable() else ascii(short)


def refuse_pointer(path: Path, handle: BinaryIO) -> None:
    """Reject a Git LFS pointer; otherwise seek back to the beginning of the file."""
    if handle.read(len(LFS_MARK)) == LFS_MARK:
        raise UserError(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download it again"
        )
    handle.seek(0)
