"""Random access to the lines of text files: plain ones by byte range, compressed ones through a seekable copy.

A block is some 32 kB of whole lines. In a plain file, block k holds the lines that *start* in bytes [k * 32768,
(k + 1) * 32768): no index is needed, and neither a line nor a UTF-8 character is ever cut (b"\\n" is never part of
another character). A .gz or .zst stream cannot be entered in its middle, so it is copied once into `cache_dir`
as independently compressed blocks with their offsets; resuming then costs one block, not the stream before it.
"""

import fcntl
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow

from minitron_train.errors import UserError
from minitron_train.files import partial_path, sync_path

BLOCK_BYTES = 32768
COMPRESSED = (".gz", ".zst")
SAMPLE_BYTES = 4096  # of a file's head and tail go into its fingerprint


@dataclass(frozen=True, slots=True)
class PlainLines:
    """Blocks of an uncompressed file."""

    path: Path
    size_bytes: int

    @property
    def num_blocks(self) -> int:
        """Of 32 kB, the last one smaller."""
        return -(-self.size_bytes // BLOCK_BYTES)

    def read(self, block: int) -> Iterator[bytes]:
        """The lines that start inside this block, without their newline."""
        start, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size_bytes)
        with self.path.open("rb") as file:
            position = start
            if start > 0:  # the line that holds byte start - 1 belongs to the block before
                file.seek(start - 1)
                position += len(file.readline()) - 1
            while position < end and (line := file.readline()):
                position += len(line)
                yield line.removesuffix(b"\n")


@dataclass(frozen=True)
class CopiedLines:
    """Blocks of a seekable copy (`copy_lines`): zstd frames, then their offsets, then how many there are."""

    path: Path  # of the copy
    source: Path  # of the original, for messages

    @cached_property
    def offsets(self) -> np.ndarray:
        """Byte offsets of the frames and of their end, int64 [num_blocks + 1]."""
        with self.path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            count = int.from_bytes(file.read(8), "little")
            file.seek(-8 - 8 * count, os.SEEK_END)
            return np.frombuffer(file.read(8 * count), dtype="<i8")

    @property
    def num_blocks(self) -> int:
        """Number of frames."""
        return len(self.offsets) - 1

    def read(self, block: int) -> Iterator[bytes]:
        """The lines of one frame, without their newline."""
        start, end = (int(offset) for offset in self.offsets[block : block + 2])
        with self.path.open("rb") as file:
            file.seek(start)
            frame = file.read(end - start)
        size_bytes = int.from_bytes(frame[:4], "little")
        raw = pyarrow.Codec("zstd").decompress(frame[4:], decompressed_size=size_bytes, asbytes=True)
        assert isinstance(raw, bytes)
        yield from raw.split(b"\n")


def copy_lines(source: Path, lines: Iterable[bytes], cache_dir: Path, fingerprint: str) -> CopiedLines:
    """Write `lines` (of `source`) as a seekable copy into `cache_dir`, once per fingerprint; other processes wait."""
    path = cache_dir / f"{source.name}.{fingerprint[:16]}.blocks"
    try:
        if not path.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    write_copy(path, lines)
    except OSError as error:
        raise UserError(
            f"{cache_dir}: the seekable copy of {source.name} cannot be written ({error.strerror}); "
            "set data.cache_dir to a folder with space"
        ) from error
    return CopiedLines(path, source)


def write_copy(path: Path, lines: Iterable[bytes]) -> None:
    """The whole copy or nothing."""
    scratch = partial_path(path)
    try:
        with scratch.open("wb") as file:
            write_frames(file, lines)
        sync_path(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_frames(file: BinaryIO, lines: Iterable[bytes]) -> None:
    """One zstd frame per block of lines; the offsets of all frames at the end."""
    codec = pyarrow.Codec("zstd")
    offsets = [0]
    for block in group_lines(lines):
        frame = codec.compress(block, asbytes=True)
        assert isinstance(frame, bytes)
        file.write(len(block).to_bytes(4, "little") + frame)
        offsets.append(offsets[-1] + 4 + len(frame))
    file.write(np.asarray(offsets, dtype="<i8").tobytes() + len(offsets).to_bytes(8, "little"))


def group_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines into blocks of at least 32 kB (the last may be smaller)."""
    group: list[bytes] = []
    size_bytes = 0
    for line in lines:
        group.append(line)
        size_bytes += len(line) + 1
        if size_bytes >= BLOCK_BYTES:
            yield b"\n".join(group)
            group, size_bytes = [], 0
    if group:
        yield b"\n".join(group)


def decompressed_lines(path: Path) -> Iterator[bytes]:
    """All lines of a .gz or .zst file; a corrupt or truncated one is a UserError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else pyarrow.input_stream(str(path), compression="zstd") as stream:
            rest = b""
            while piece := stream.read(1 << 20):
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
            if rest:
                yield rest
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be decompressed ({error}); the file is corrupt: fetch or write it again"
        ) from error


def open_lines(path: Path, cache_dir: Path) -> PlainLines | CopiedLines:
    """Random access to one file's lines; a compressed file is copied first when it was not before."""
    if path.suffix in COMPRESSED:
        return copy_lines(path, decompressed_lines(path), cache_dir, sample_sha256(path))
    return PlainLines(path, path.stat().st_size)


def sample_sha256(path: Path) -> str:
    """sha256 of a file's name, size, first and last 4 kB: notices changes without reading terabytes."""
    size_bytes = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}\0{size_bytes}\0".encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, size_bytes - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
