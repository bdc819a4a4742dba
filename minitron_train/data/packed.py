"""Compressed files: how a file is compressed, by its name or content, and the bytes inside it."""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from minitron_train.runtime.errors import UserError, first_line

PIECE_BYTES = 1 << 16  # compressed bytes per call of a decompressor


class Members(io.RawIOBase):
    """The bytes inside a .bz2 or .xz file of one or more members.

    The standard library's readers treat damage and padding after the first member as the end of the file, and drop the
    rest without an error.
    """

    def __init__(self, make: Callable[[], Any], file: BinaryIO) -> None:
        self.make = make
        self.file = file
        self.decoder = make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill part of the buffer. Returns the number of bytes, 0 at the end of the file.

        Raises:
            EOFError: the file ends inside a member.
            OSError, lzma.LZMAError: a member is damaged, or is followed by other data.
        """
        data = b""
        while not data:
            raw = self.decoder.unused_data if self.decoder.eof else b""
            if self.decoder.eof or self.decoder.needs_input:
                raw = raw or self.file.read(PIECE_BYTES)
                if not raw and not self.decoder.eof:
                    raise EOFError("the file ends inside compressed data")
            if self.decoder.eof:
                while raw and not (raw := raw.lstrip(b"\0")):  # xz pads members with zeros
                    raw = self.file.read(PIECE_BYTES)
                if not raw:
                    return 0
                self.decoder = self.make()
            data = self.decoder.decompress(raw, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_members(make: Callable[[], Any], file: BinaryIO) -> BinaryIO:
    """A buffered stream of `Members`."""
    return io.BufferedReader(Members(make, file), PIECE_BYTES)


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {  # all of them read files of several members
    ".gz": gzip.open,
    ".zst": partial(pyarrow.input_stream, compression="zstd"),
    ".bz2": partial(open_members, bz2.BZ2Decompressor),
    ".xz": partial(open_members, lzma.LZMADecompressor),
}
MAGIC = {  # no UTF-8 text begins like this; bzip2's is long enough to be sure
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
}
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what the openers raise on damaged files
NUMBERS = re.compile(r"(?<=.)[.-]\d+(-of-\d+)?$")  # number of a rotated file or a shard, at the end of a name
HEAD_BYTES = 4096


def suffixes(path: Path) -> tuple[str, str]:
    """The suffixes of the format and of the compression, in lower case; "" if there is none.

    Numbers at the end are ignored: `A.JSONL.1` has .jsonl, `b.json-00000-of-00008.gz` has .json and .gz.
    """
    return suffixes_of_name(path.name)


@lru_cache(maxsize=1 << 17)  # asked several times for each file of a corpus
def suffixes_of_name(name: str) -> tuple[str, str]:
    """`suffixes` of a file name."""
    name = without_numbers(name.lower())
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
    """The suffix of a file's compression, by its name or else by its first bytes; "" if it is not compressed."""
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
    """The error for a file that the system cannot read, or whose content does not fit its name (`fault`)."""
    if isinstance(error, OSError) and error.errno:
        reason = os.strerror(error.errno)
        return UserError(f"{path}: cannot be read ({reason}); restore the file, or give another data path")
    return UserError(f"{path}: {fault} ({first_line(error)}); the file is corrupt: fetch or write it again")
