"""Which files a source is made of: their content by a bounded number of bytes, and whether they are still the same.

A file's name, size and content are its identity, not its time: a copy of a corpus on another machine is the same corpus.
Sources of up to WHOLE_BYTES are hashed whole, so that a rewrite with the same size is seen. Of larger ones each file has
its share of WHOLE_BYTES in evenly spaced samples, its first and last bytes among them. There a rewrite that misses
every sample is seen by the file's time alone: `Watch` stops a run that reads such a file, `changes` warns a resumed one.
"""

import datetime
import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from minitron_train.runtime.errors import MachineError, UserError

WHOLE_BYTES = 1 << 28
SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells for the price of one stat that a file may have changed."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int  # changes with the content also where the mtime is put back
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The file as it is now.

        Raises:
            UserError: it has gone.
            MachineError: the file system does not answer.
        """
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path}: was deleted after this run had opened it; restore it, then start again to resume"
            ) from None
        except OSError as error:
            raise unreadable(error, path) from error
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file as it was read."""

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str  # of name, size and content
    is_whole: bool  # whether all of the content went into it, or samples


def unreadable(error: OSError, path: Path | str = "data") -> MachineError:
    """One line for a read that the machine refuses: a device, a network file system."""
    reason = error.strerror or os.strerror(error.errno or errno.EIO)
    return MachineError(
        f"{error.filename or path}: cannot be read any more ({reason}); when it can, start again to resume at the last "
        "checkpoint"
    )


def records_of(paths: Sequence[Path]) -> list[FileRecord]:
    """The files of one source; reads WHOLE_BYTES of them at most, and 8 kB of each."""
    stamps = [Stamp.of(path) for path in paths]
    total = sum(stamp.size_bytes for stamp in stamps)
    return [describe_file(path, stamp, share(stamp, total)) for path, stamp in zip(paths, stamps, strict=True)]


def share(stamp: Stamp, total_bytes: int) -> int:
    """How many bytes of a file are read, where all files of its source have `total_bytes`."""
    if total_bytes <= WHOLE_BYTES:
        return stamp.size_bytes
    return max(2 * SAMPLE_BYTES, WHOLE_BYTES * stamp.size_bytes // total_bytes)


def describe_file(path: Path, stamp: Stamp, share_bytes: int) -> FileRecord:
    """The record of a file that has this stamp, of which `share_bytes` are read."""
    try:
        sha256 = content_sha256(path, stamp, share_bytes)
    except OSError as error:
        raise unreadable(error, path) from error
    return FileRecord(str(path), stamp.size_bytes, stamp.mtime_ns, sha256, share_bytes >= stamp.size_bytes)


@lru_cache(maxsize=1 << 16)  # the stages of a chain ask again for files that have not changed
def content_sha256(path: Path, stamp: Stamp, share_bytes: int) -> str:
    """sha256 of a file's name, size and content: all of it, or samples of 4 kB that add up to `share_bytes`."""
    digest = hashlib.sha256(f"{path.name}\0{stamp.size_bytes}\0".encode())
    with path.open("rb") as file:
        if share_bytes >= stamp.size_bytes:
            digest.update(hashlib.file_digest(file, "sha256").digest())
            return digest.hexdigest()
        num_samples, last = max(2, share_bytes // SAMPLE_BYTES), stamp.size_bytes - SAMPLE_BYTES
        for number in range(num_samples):
            file.seek(last * number // (num_samples - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class Watch:
    """Files as they were when a run opened them; `check` stops a run before it trains on other content."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.stamps = {path: Stamp.of(path) for path in paths}
        self.total_bytes = sum(stamp.size_bytes for stamp in self.stamps.values())
        self.records = {record.path: record for record in records_of(paths)}

    def check_all(self) -> None:
        """`check` every file."""
        self.check(*self.stamps)

    def check(self, *paths: Path) -> None:
        """Look whether these files are still the same.

        A file that was only touched, or replaced by an equal one, is the same.

        Raises:
            UserError: one has changed or gone; the line names it.
        """
        for path in paths:
            known, now = self.stamps[path], Stamp.of(path)
            if now != known:
                self.refuse_changed(path, known, now)
                self.stamps[path] = now

    def refuse_changed(self, path: Path, known: Stamp, now: Stamp) -> None:
        """Raise unless the content is the same as far as can be seen."""
        record = self.records[str(path)]
        if now.size_bytes != known.size_bytes:
            how = f"had {known.size_bytes:,} bytes, has {now.size_bytes:,}"
        elif describe_file(path, now, share(now, self.total_bytes)).sha256 != record.sha256:
            how = "same size, other content"
        elif not record.is_whole and (now.mtime_ns, now.inode) != (known.mtime_ns, known.inode):
            how = f"same size, written {date(now.mtime_ns)}"
        else:
            return
        raise UserError(
            f"{path}: changed after this run had opened it ({how}); restore it, then start again to resume, or train on "
            "the new data in another output_dir"
        )


def changes(old: Sequence[FileRecord], new: Sequence[FileRecord]) -> tuple[list[str], list[str]]:
    """What happened to the files of a run since it began: what makes them others, and what their content cannot tell.

    Files that have moved are the same.
    """
    same = {record.sha256 for record in old} & {record.sha256 for record in new}
    before, after = ({record.path: record for record in records} for records in (old, new))
    changed, doubtful = [], []
    for path in sorted({*before, *after}):
        was, now = before.get(path), after.get(path)
        if was is None or now is None:
            (found,) = filter(None, (was, now))
            if found.sha256 in same:
                continue
            changed.append(f"{path} is {'new' if was is None else 'missing'}")
        elif was.size_bytes != now.size_bytes:
            changed.append(f"{path} had {was.size_bytes:,} bytes, has {now.size_bytes:,}")
        elif was.sha256 != now.sha256:
            changed.append(f"{path} was rewritten with the same size")
        elif not now.is_whole and was.mtime_ns != now.mtime_ns:
            doubtful.append(f"{path} was written {date(now.mtime_ns)}; its size and samples are the same")
    return changed, doubtful


def date(mtime_ns: int) -> str:
    """A file's time for a message, UTC."""
    return datetime.datetime.fromtimestamp(mtime_ns / 1e9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
