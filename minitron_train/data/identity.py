"""Fingerprints of a source's files from a bounded number of bytes, and the check that the files have not changed.

A file's name, size and content are its identity; its time is not. So a copy of a corpus on another machine is the same
corpus. Sources of up to WHOLE_BYTES are hashed completely, which detects a rewrite with the same size. In a larger source
each file has its share of WHOLE_BYTES in evenly spaced samples, including its first and last bytes. There, only the file's
time reveals a rewrite that misses every sample: `Watch` stops a run that reads such a file, `changes` warns a resumed one.
"""

import datetime
import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from minitron_train.runtime.errors import MachineError, UserError

WHOLE_BYTES = 1 << 28
SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Stamp:
    """The result of one stat, which shows that a file may have changed."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int  # changes with the content even if the mtime is restored
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The file as it is now.

        Raises:
            UserError: it was deleted.
            MachineError: the file system does not answer.
        """
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path}: was deleted after this run had opened it; restore it, then start again to resume"
            ) from None
        except OSError as error:
            raise read_failed(error, path) from error
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file at the time it was read."""

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str  # over name, size and content
    is_whole: bool  # whether all of the content was hashed, not samples


def read_failed(error: OSError, path: Path | str = "data") -> MachineError:
    """The error for a read that fails in a device or a network file system."""
    reason = error.strerror or os.strerror(error.errno or errno.EIO)
    return MachineError(
        f"{error.filename or path}: can no longer be read ({reason}); repair that, then start again to resume at the last "
        "checkpoint"
    )


def records_of(paths: Sequence[Path]) -> list[FileRecord]:
    """Records of one source's files. Reads about WHOLE_BYTES in total at most, but at least 8 kB of each file."""
    stamps = [Stamp.of(path) for path in paths]
    total = sum(stamp.size_bytes for stamp in stamps)
    return [describe_file(path, stamp, share(stamp, total)) for path, stamp in zip(paths, stamps, strict=True)]


def share(stamp: Stamp, total_bytes: int) -> int:
    """How many bytes of a file are read, if all files of its source have `total_bytes`."""
    if total_bytes <= WHOLE_BYTES:
        return stamp.size_bytes
    return max(2 * SAMPLE_BYTES, WHOLE_BYTES * stamp.size_bytes // total_bytes)


def describe_file(path: Path, stamp: Stamp, share_bytes: int) -> FileRecord:
    """The record of a file with this stamp, from `share_bytes` of its content."""
    try:
        sha256 = content_sha256(path, stamp, share_bytes)
    except OSError as error:
        raise read_failed(error, path) from error
    return FileRecord(str(path), stamp.size_bytes, stamp.mtime_ns, sha256, share_bytes >= stamp.size_bytes)


@lru_cache(maxsize=1 << 16)  # the stages of a chain ask for the same files
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
    """Files as they were when a run opened them; `check` stops a run before it trains on other content.

    Args:
        records: what rank 0 has found out about these files, by path, so that other ranks need not read them. None: read them.

    Raises:
        UserError: this rank sees another content than rank 0.
    """

    def __init__(self, paths: Sequence[Path], records: Mapping[str, FileRecord] | None = None) -> None:
        self.stamps = {path: Stamp.of(path) for path in paths}
        self.total_bytes = sum(stamp.size_bytes for stamp in self.stamps.values())
        self.records = records or {record.path: record for record in records_of(paths)}
        for path, stamp in self.stamps.items():
            self.check_record(path, stamp)

    def check_record(self, path: Path, stamp: Stamp) -> None:
        """Compare the content with the record if size or time differ; nodes may see different times of one file."""
        record = self.records[str(path)]
        if (stamp.size_bytes, stamp.mtime_ns) == (record.size_bytes, record.mtime_ns):
            return
        if describe_file(path, stamp, share(stamp, self.total_bytes)).sha256 != record.sha256:
            raise UserError(
                f"{path}: had {record.size_bytes:,} bytes on rank 0, has {stamp.size_bytes:,} here or other content; give all "
                "nodes the same file, then start again"
            )

    def check_all(self) -> None:
        """`check` every file."""
        self.check(*self.stamps)

    def check(self, *paths: Path) -> None:
        """Check that these files have not changed.

        A file that was only touched, or replaced by an equal one, has not.

        Raises:
            UserError: names the file that was changed or deleted.
        """
        for path in paths:
            known, now = self.stamps[path], Stamp.of(path)
            if now != known:
                self.refuse_changed(path, known, now)
                self.stamps[path] = now

    def refuse_changed(self, path: Path, known: Stamp, now: Stamp) -> None:
        """Raise a UserError unless the content is the same, as far as the samples show."""
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
    """What happened to the files of a run since it began: certain changes, and possible ones that no sample shows.

    Files that were moved count as the same.
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
    """A file's time in UTC, for a message."""
    return datetime.datetime.fromtimestamp(mtime_ns / 1e9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
