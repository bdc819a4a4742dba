"""Files and folders that appear whole or not at all: write beside, fsync, rename."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError

PARTIAL = ".partial-"  # as in `pruned.partial-1a2b`: unfinished, never read; of a stage removed by its next run
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # of a repository: OWNER/NAME
REPLACED = ".replaced"  # where the old folder waits while the new one takes its place; put back after a kill


def why_no_folder(path: Path) -> str:
    """What stands in place of a Hugging Face folder, and what to give instead."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return "is a GGUF file, which is quantised; give the folder of the model's unquantised checkpoint"
    if path.is_file():
        return f"is a file; give its folder, {path.parent}"
    if HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            f"no such folder; to take it from the hub, set teacher.source=hub teacher.repo_id={path} "
            "teacher.revision=COMMIT in place of the path and run `fetch`"
        )
    return "no such folder; give a Hugging Face folder"


def sync_path(path: Path) -> None:
    """fsync one file or folder (a folder's fsync makes renames inside it durable)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_path(path: Path) -> Path:
    """A fresh name beside `path`, on the same file system, that marks unfinished work."""
    return path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the file system's refusals while writing `path` into a UserError that names the remedy.

    What is refused elsewhere meanwhile, as reading a file without permission, is passed on.
    """
    remedies = {
        errno.ENOSPC: "the disk is full; free space or set output_dir to another disk",
        errno.EDQUOT: "the disk quota is used up; free space or set output_dir to another disk",
        errno.EACCES: "permission denied; choose an output_dir that you may write to",
        errno.EPERM: "permission denied; choose an output_dir that you may write to",
        errno.EROFS: "the file system is read-only; choose another output_dir",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another output_dir",
        errno.EEXIST: "a file stands where a folder must go; move it or choose another output_dir",
        errno.EISDIR: "a folder stands where a file must go; move it or choose another output_dir",
    }
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors has an error class of its own, with the system's words in it
        code = getattr(error, "errno", None) or next((c for c in remedies if os.strerror(c) in str(error)), None)
        if code not in remedies or not (code in (errno.ENOSPC, errno.EDQUOT) or concerns(error, path)):
            raise
        raise UserError(f"cannot write {path}: {remedies[code]}") from error


def concerns(error: Exception, path: Path) -> bool:
    """Whether an error names `path`, a folder above it, something in it, or something beside it named after it."""
    path = path.absolute()
    for name in filter(None, (getattr(error, "filename", None), getattr(error, "filename2", None))):
        named = Path(str(name)).absolute()
        own = [part.name.removeprefix(".") for part in (named, *named.parents) if part.parent == path.parent]
        if named in path.parents or any(f"{part}.".startswith(f"{path.name}.") for part in own):
            return True
    return False


@contextlib.contextmanager
def parent_folders(path: Path) -> Iterator[None]:
    """Make the folders above `path`; on failure those that were made, and are empty, go again."""
    made = [folder for folder in path.parents if not folder.exists()]
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as in /proc
            raise UserError(f"cannot write {path}: no folder can be made there; choose another output_dir") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one that holds something stays, and so do those above it
            for folder in made:
                folder.rmdir()
        raise


@contextlib.contextmanager
def exclusive(lock: Path, folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` for a block, by a lock on the file `lock`, which goes with this process.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        while True:
            with disk_errors(folder):
                lock.parent.mkdir(parents=True, exist_ok=True)
                handle = stack.enter_context(lock.open("w"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is at work in {folder}; wait for it to end, or end it") from error
            except OSError as error:  # as on NFS or Lustre that are mounted without locks
                say(f"{lock}: cannot be locked ({error.strerror}); take care that no second process works in {folder}")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                    break  # else the one before has deleted this file between open and flock: take the new one
        stack.callback(lock.unlink, missing_ok=True)
        yield


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty scratch file beside `path`; on success it is fsynced and renamed over `path`, on failure removed.

    Scratch files that killed processes left for `path` are deleted; a lock shows which ones are still being written.
    """
    with disk_errors(path), parent_folders(path):
        remove_scratch_files(path.parent, f"{glob.escape(path.name)}{PARTIAL}*")
        scratch, lock = locked_scratch(path)
        mode = scratch.stat().st_mode
        try:
            yield scratch
            open_to_umask(scratch, mode)
            sync_path(scratch)
            os.replace(scratch, path)
            sync_path(path.parent)
        finally:
            scratch.unlink(missing_ok=True)
            os.close(lock)


def open_to_umask(file: Path, mode: int) -> None:
    """Let those read and write `file` whom the umask allows: safetensors writes for the owner alone (0600).

    Args:
        mode: of a file or folder that was just created beside it, which the umask has shaped.
    """
    found = file.lstat()
    wanted = found.st_mode | (mode & 0o666)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and wanted != found.st_mode:
        file.chmod(stat.S_IMODE(wanted))


def locked_scratch(path: Path) -> tuple[Path, int]:
    """A new empty file beside `path`, and the descriptor that holds its lock until the process ends or closes it."""
    while True:
        scratch = partial_path(path)
        lock = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # NFS or Lustre mounted without locks: then nobody deletes it either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if scratch.exists():
            return scratch, lock
        os.close(lock)  # another process has taken it for a leftover, between open and flock


def remove_scratch_files(folder: Path, pattern: str = f"*{PARTIAL}*") -> None:
    """Delete the scratch files that killed processes left in `folder`; those that a living one still writes stay."""
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError):  # it is locked, a folder, or gone by now
            lock = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(lock)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty scratch folder beside `path`; on success its files are fsynced and it takes the place of `path`.

    An older `path` is moved aside first and removed last, so that a kill at any moment leaves the old folder, or the
    new one, but never a mixture (`recover` puts back an old one that was just moved aside).
    """
    with disk_errors(path), parent_folders(path):
        recover(path)
        scratch = partial_path(path)
        scratch.mkdir()
        try:
            yield scratch
            mode = scratch.stat().st_mode
            for file in scratch.rglob("*"):
                open_to_umask(file, mode)
                sync_path(file)
            sync_path(scratch)
            old = path.with_name(path.name + REPLACED)
            if path.exists():
                os.replace(path, old)
            os.replace(scratch, path)
            sync_path(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def standing(path: Path) -> Path:
    """Where the folder `path` is to be read: `path`, or its old self that a kill has left aside (see `recover`)."""
    old = path.with_name(path.name + REPLACED)
    return old if old.exists() and not path.exists() else path


def recover(path: Path) -> None:
    """Clean up after killed runs: put back a finished folder that was being replaced, delete unfinished work.

    Call it only from the process that holds the stage's lock: it would delete another process's unfinished folder.
    """
    old = path.with_name(path.name + REPLACED)
    if old.exists():
        shutil.rmtree(old) if path.exists() else os.replace(old, path)
    for leftover in unfinished(path):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    remove_scratch_files(path)


def set_aside(path: Path) -> bool:
    """Move the folder `path` aside, so that `recover` or `drop_replaced` decides about it; False: a link or a mount stays."""
    if path.is_symlink() or path.is_mount():
        return False
    os.replace(path, path.with_name(path.name + REPLACED))
    return True


def drop_replaced(path: Path) -> None:
    """Delete the old folder that waits aside: the new one in `path` is worth more from now on."""
    shutil.rmtree(path.with_name(path.name + REPLACED), ignore_errors=True)


def unfinished(path: Path) -> list[Path]:
    """Scratch files and folders for `path` itself that exist beside it."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}{PARTIAL}*"))


def remove_folder(path: Path, *, first: str, last: str) -> None:
    """Delete a folder as far as the system lets it; two of its files at the beginning and at the end.

    So a kill leaves nothing that passes for finished (`first` is gone), nor for somebody else's (`last` is there).
    """
    for item in sorted(path.glob("*"), key=lambda item: (item.name == last) - (item.name == first)):
        with contextlib.suppress(OSError):
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    with contextlib.suppress(OSError):  # it may be a mount, or a link
        path.rmdir()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities are refused (they are not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Hex sha256 of one file's bytes, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def byte_size(num_bytes: int) -> str:
    """538090408 -> "538.1 MB" (decimal units, as disks are sold)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes} B"
