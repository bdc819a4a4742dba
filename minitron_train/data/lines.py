"""Random access to the lines of text files: plain ones by byte range, compressed ones through a seekable copy.

A block is about 32 kB of complete lines. In a plain file, block k holds the lines that *start* in bytes [k * 32768,
(k + 1) * 32768). That needs no index, and splits neither a line nor a UTF-8 character (b"\\n" is never part of another
character). `PlainText` is for files without a format, where lines have no meaning: it splits a line that fills a block
between words. A compressed stream cannot be read from the middle. So it is copied once into `cache_dir`, as independently
compressed blocks with their offsets; a resumed run then reads one block instead of everything before it. `make_copies`
writes and reports missing copies.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow

from minitron_train.data import packed
from minitron_train.runtime.console import progress, say
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import byte_size, partial_path, sync_path

BLOCK_BYTES = 32768
PIECE_BYTES = 1_000_000  # one step of the progress bar, in bytes of a compressed file
MAX_LINE_BYTES = 1 << 30  # lines are held in memory
FRAME_HEAD = struct.Struct("<II")  # a frame begins with the size of its text and its CRC-32
COPY_END = b"blocks-2"  # the last bytes of a complete copy
SAMPLE_BYTES = 4096  # a file's head and tail of this size are hashed into the name of its copy
WORD_BYTES = 256  # searched for a space, where a long line is split


@dataclass(frozen=True, slots=True)
class PlainLines:
    """Blocks of an uncompressed file."""

    path: Path
    size_bytes: int

    @property
    def num_blocks(self) -> int:
        return -(-self.size_bytes // BLOCK_BYTES)

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The opened file. It must have at least its original size; it may grow.

        Raises:
            UserError: it was deleted or cut off, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes < self.size_bytes:
                    raise UserError(
                        f"{self.path}: has {size_bytes:,} bytes, but had {self.size_bytes:,} when it was opened; "
                        "restore the file, and run again"
                    )
                yield file
        except OSError as error:
            raise packed.unreadable(self.path, error) from error

    def read(self, block: int) -> Iterator[bytes]:
        """The lines that start inside this block, without their newline."""
        start, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size_bytes)
        with self.opened() as file:
            position = start
            if start > 0:  # the line that holds byte start - 1 belongs to the block before, and may fill this one
                file.seek(start - 1)
                position += len(file.readline(end - start + 1)) - 1
            while position < end and (line := file.readline()):
                position += len(line)
                yield line.removesuffix(b"\n")


class PlainText(PlainLines):
    """Blocks of an uncompressed file without a format. Each is below 64 kB, whatever the length of the lines."""

    def read(self, block: int) -> Iterator[bytes]:
        """The lines that start inside this block, without their newline, or the part of a longer line that lies in it."""
        start, end = self.start(block), self.start(block + 1)
        if start < end:
            with self.opened() as file:
                file.seek(start)
                yield from file.read(end - start).removesuffix(b"\n").split(b"\n")

    def start(self, block: int) -> int:
        """Offset of the first line that starts in this block; of the first word, if a line fills the block."""
        position = min(block * BLOCK_BYTES, self.size_bytes)
        if position in (0, self.size_bytes):
            return position
        with self.opened() as file:
            file.seek(position - 1)
            raw = file.read(BLOCK_BYTES + 1)
        if (newline := raw.find(b"\n")) >= 0:
            return position + newline
        return position + word_start(raw[1:]) if len(raw) > BLOCK_BYTES else self.size_bytes


def word_start(raw: bytes) -> int:
    """Offset of the first word that begins in `raw` (UTF-8); of the first character if no space is within WORD_BYTES."""
    if (space := raw.find(b" ", 0, WORD_BYTES)) >= 0:
        return space + 1
    return next((i for i, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), 0)


def short_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Split lines longer than two blocks between words, into pieces of about a block."""
    for line in lines:
        start = 0
        while len(line) - start > 2 * BLOCK_BYTES:
            middle = start + BLOCK_BYTES
            end = middle + word_start(line[middle : middle + WORD_BYTES])
            yield line[start:end]
            start = end
        yield line[start:]


@dataclass(frozen=True)
class CopiedLines:
    """Blocks of a seekable copy, which `make_copies` writes: zstd frames, their offsets, their number, COPY_END."""

    path: Path  # the copy
    source: Path  # the original, for messages

    @cached_property
    def offsets(self) -> np.ndarray:
        """Byte offsets of the frames and of their end, int64 [num_blocks + 1]. A damaged copy raises a UserError."""
        try:
            return read_offsets(self.path)
        except (OSError, ValueError) as error:
            raise self.damaged(error) from error

    @property
    def is_whole(self) -> bool:
        """Whether the copy exists and ends like a complete one."""
        try:
            return len(read_offsets(self.path)) > 0
        except (OSError, ValueError):
            return False

    @property
    def num_blocks(self) -> int:
        return len(self.offsets) - 1

    @property
    def size_bytes(self) -> int:
        """Lower bound of the text's size: a frame holds at least a block."""
        return self.num_blocks * BLOCK_BYTES

    def read(self, block: int) -> Iterator[bytes]:
        """The lines of one frame, without their newline. A damaged copy raises a UserError."""
        start, end = (int(offset) for offset in self.offsets[block : block + 2])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                frame = file.read(end - start)
            size_bytes, crc = FRAME_HEAD.unpack_from(frame)
            if size_bytes > MAX_LINE_BYTES + BLOCK_BYTES:
                raise ValueError("the stated size is too large")
            raw = pyarrow.Codec("zstd").decompress(frame[FRAME_HEAD.size :], decompressed_size=size_bytes, asbytes=True)
            assert isinstance(raw, bytes)
            if zlib.crc32(raw) != crc:
                raise ValueError("the checksum differs")
        except (pyarrow.ArrowException, OSError, ValueError, struct.error) as error:
            raise self.damaged(error) from error
        yield from raw.split(b"\n")

    def damaged(self, error: Exception) -> UserError:
        """The error for a copy that cannot be read."""
        return UserError(
            f"{self.path}: the copy of {self.source} cannot be read ({first_line(error)}); delete it and start again"
        )


def read_offsets(path: Path) -> np.ndarray:
    """The offsets at the end of a seekable copy, int64 [frames + 1].

    Raises:
        ValueError: they are not those of a complete copy.
    """
    with path.open("rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        tail = len(COPY_END) + 8
        file.seek(max(0, size_bytes - tail))
        end = file.read()
        count = int.from_bytes(end[:8], "little")
        start = size_bytes - tail - 8 * count
        if end[8:] != COPY_END or count < 1 or start < 0:
            raise ValueError("its end is damaged")
        file.seek(start)
        offsets = np.frombuffer(file.read(8 * count), dtype="<i8")
    if [offsets[0], offsets[-1]] != [0, start] or (np.diff(offsets) <= FRAME_HEAD.size).any():
        raise ValueError("its offsets are damaged")
    return offsets


def copy_of(source: Path, cache_dir: Path, fingerprint: str) -> CopiedLines:
    """The copy of a source with this fingerprint, which may not exist yet.

    The name depends on the format too: an older version that shares the cache keeps its own copy.
    """
    digest = hashlib.sha256(fingerprint.encode() + COPY_END).hexdigest()
    return CopiedLines(cache_dir / f"{source.name}.{digest[:16]}.blocks", source)


def make_copies(copies: Sequence[CopiedLines], lines_of: Callable[[Path], Iterable[bytes]]) -> None:
    """Write the missing or damaged copies, several at once, and print one line for all.

    Threads suffice: (de)compression and checksums, which take most of the time, run outside Python's lock.

    Args:
        lines_of: returns a source's lines.

    Raises:
        UserError: a source cannot be read, or a copy cannot be written; no further copy is begun.
    """
    missing = [copy for copy in copies if not copy.is_whole]
    if not missing:
        return
    size = byte_size(sum(copy.source.stat().st_size for copy in missing))
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    folder = missing[0].path.parent
    say(
        f"copying {missing[0].source}{others} ({size}) into {folder} (data.cache_dir), once, as blocks for random access"
    )
    if len(missing) == 1:  # here, where it can show its progress
        return make_copy(missing[0], lines_of(missing[0].source))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(lambda copy: make_copy(copy, lines_of(copy.source)), copy) for copy in missing]
        try:
            for job in progress(as_completed(jobs), "copies", len(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_copy(copy: CopiedLines, lines: Iterable[bytes]) -> None:
    """Write one copy if it is missing or damaged. Other processes that need it wait."""
    folder = copy.path.parent
    try:
        if not copy.is_whole:
            folder.mkdir(parents=True, exist_ok=True)
            with copy.path.with_suffix(".lock").open("w") as lock:
                with contextlib.suppress(OSError):
                    # it fails on a file system without locks, where several processes may write the copy
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not copy.is_whole:
                    write_copy(copy.path, bounded(copy.source, lines))
    except OSError as error:
        raise UserError(
            f"{folder}: the seekable copy of {copy.source.name} cannot be written ({error.strerror}); "
            "set data.cache_dir to a folder with space"
        ) from error


def write_copy(path: Path, lines: Iterable[bytes]) -> None:
    """Write one copy atomically."""
    scratch = partial_path(path)
    try:
        with scratch.open("wb") as file:
            write_frames(file, lines)
        sync_path(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_frames(file: BinaryIO, lines: Iterable[bytes]) -> None:
    """Write one zstd frame per block of lines, then the offsets of all frames."""
    codec = pyarrow.Codec("zstd")
    offsets = [0]
    for block in group_lines(lines):
        frame = codec.compress(block, asbytes=True)
        assert isinstance(frame, bytes)
        file.write(FRAME_HEAD.pack(len(block), zlib.crc32(block)) + frame)
        offsets.append(offsets[-1] + FRAME_HEAD.size + len(frame))
    file.write(np.asarray(offsets, dtype="<i8").tobytes() + len(offsets).to_bytes(8, "little") + COPY_END)


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


def check_line(path: Path, size_bytes: int) -> None:
    """Refuse a line that is too long for the memory."""
    if size_bytes > MAX_LINE_BYTES:
        raise UserError(f"{path}: a line or document of over {byte_size(MAX_LINE_BYTES)}; split it into several")


def bounded(path: Path, lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file; a UserError for a line that is too long for a frame."""
    for line in lines:
        check_line(path, len(line))
        yield line


def decompressed_lines(path: Path, cut_bytes: int | None = None) -> Iterator[bytes]:
    """All lines inside a file, compressed or not.

    Args:
        cut_bytes: split lines between words into parts of at least so many bytes (for text without a format).

    Raises:
        UserError: the file is missing, corrupt or cut off; or without `cut_bytes`, a line exceeds MAX_LINE_BYTES.
    """
    try:
        parts: list[bytes] = []  # parts of an unfinished line
        size_bytes = 0
        for piece in decompressed_pieces(path):
            first, *others = piece.split(b"\n")
            parts.append(first)
            size_bytes += len(first)
            if others:
                yield b"".join(parts)
                yield from others[:-1]
                parts, size_bytes = others[-1:], len(others[-1])
            if cut_bytes and size_bytes >= cut_bytes + WORD_BYTES:
                line = b"".join(parts)
                end = cut_bytes + word_start(line[cut_bytes : cut_bytes + WORD_BYTES])
                yield line[:end]
                parts, size_bytes = [line[end:]], len(line) - end
            else:
                check_line(path, size_bytes)
        if rest := b"".join(parts):
            yield rest
    except packed.ERRORS as error:
        raise packed.unreadable(path, error) from error


def decompressed_pieces(path: Path) -> Iterator[bytes]:
    """The text inside a file; progress is shown in megabytes of the file."""
    ends = range(PIECE_BYTES, path.stat().st_size, PIECE_BYTES)
    with path.open("rb") as file, packed.unpack(path, file) as stream:
        for end in progress(ends, f"copy of {path.name} in MB", len(ends)):
            while file.tell() < end and (piece := stream.read(PIECE_BYTES)):
                yield piece
        while piece := stream.read(PIECE_BYTES):
            yield piece


def open_lines(path: Path, cache_dir: Path) -> PlainLines | CopiedLines:
    """Random access to one file's lines. A compressed file is read through its copy, which may not exist yet."""
    try:
        if packed.packing(path):
            return copy_of(path, cache_dir, sample_sha256(path))
        return PlainLines(path, path.stat().st_size)
    except OSError as error:
        raise packed.unreadable(path, error) from error


def sample_sha256(path: Path) -> str:
    """sha256 of a file's name, size, time, first and last 4 kB; it names the file's seekable copy."""
    try:
        status = path.stat()
        digest = hashlib.sha256(os.fsencode(path.name) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, status.st_size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise packed.unreadable(path, error) from error
    return digest.hexdigest()
