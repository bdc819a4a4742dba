"""Compressed files: the compression a file has, by name or by content, and the bytes inside."""

import bz2
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from minitron_train.errors import UserError, first_line

OPENERS: dict[str, Callable[[BinaryIO], Any]] = {  # all of them read files of several members, one after the other
    ".gz": gzip.open,
    ".zst": partial(pyarrow.input_stream, compression="zstd"),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
MAGIC = {  # no UTF-8 text begins like this; bzip2's is long enough to be sure
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
}
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what the openers raise on damaged files
NUMBERS = re.compile(r"(?<=.)[.-]\d+(-of-\d+)?$")  # at the end of a name: of a rotated file or a shard
HEAD_BYTES = 4096


def suffixes(path: Path) -> tuple[str, str]:
    """The format's and the compression's suffix in lower case, each "" if there is none.

    Numbers at the end do not count: `A.JSONL.1` has .jsonl, `b.json-00000-of-00008.gz` has .json and .gz.
    """
    name = without_numbers(path.name.lower())
    packed = Path(name).suffix
    if packed in OPENERS:
        return Path(without_numbers(name.removesuffix(packed))).suffix, packed
    return Path(name).suffix, ""


def without_numbers(name: str) -> str:
    """A file name without the numbers at its end."""
    while (shorter := NUMBERS.sub("", name)) != name:
        name = shorter
    return name


def packing(path: Path) -> str:
    """The suffix of a file's compression, by its name, else by its first bytes; "" for none."""
    if packed := suffixes(path)[1]:
        return packed
    with path.open("rb") as file:
        start = file.read(16)
    return next((suffix for suffix, magic in MAGIC.items() if magic.match(start)), "")


def unpack(path: Path, file: BinaryIO) -> Any:
    """A stream of the bytes inside an opened file; the file itself if it is not compressed."""
    packed = packing(path)
    return OPENERS[packed](file) if packed else file


def head(path: Path) -> bytes:
    """The first 4 kB inside a file.

    Raises:
        UserError: it cannot be read or decompressed.
    """
    try:
        with path.open("rb") as file, unpack(path, file) as stream:
            return stream.read(HEAD_BYTES)
    except ERRORS as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception, fault: str = "cannot be decompressed") -> UserError:
    """The one line for a file that the system cannot read, or that is not what its name promises (`fault`)."""
    if isinstance(error, OSError) and error.errno:
        reason = os.strerror(error.errno)
        return UserError(f"{path}: cannot be read ({reason}); restore the file, or give another data path")
    return UserError(f"{path}: {fault} ({first_line(error)}); the file is corrupt: fetch or write it again")
