"""Atomic files and folders: write under a scratch name next to the target, fsync, rename."""

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

PARTIAL = ".partial-"  # in scratch names such as `pruned.partial-1a2b`: never read, deleted by the stage's next run
REPLACED = ".replaced"  # suffix of the old folder while the new one is renamed; `recover` restores it after a kill
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME of a repository


def why_no_folder(path: Path) -> str:
    """Why `path` is not a Hugging Face folder, with the remedy."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return "is a GGUF file, which is quantised; give the folder of the model's unquantised checkpoint"
    if path.is_file():
        return f"is a file; give its folder, {path.parent}"
    if HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            f"no such folder; to download it from the hub, set teacher.source=hub teacher.repo_id={path} "
            "teacher.revision=COMMIT instead of the path and run `fetch`"
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
    """A new scratch name next to `path`, on the same file system."""
    return path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn file system errors while writing `path` into a UserError with the remedy.

    Errors about other files, such as one without read permission, pass through.
    """
    remedies = {
        errno.ENOSPC: "the disk is full; free space or set output_dir to another disk",
        errno.EDQUOT: "the disk quota is used up; free space or set output_dir to another disk",
        errno.EACCES: "permission denied; choose an output_dir that you may write to",
        errno.EPERM: "permission denied; choose an output_dir that you may write to",
        errno.EROFS: "the file system is read-only; choose another output_dir",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another output_dir",
        errno.EEXIST: "a file has the name that a folder needs; move it or choose another output_dir",
        errno.EISDIR: "a folder has the name that a file needs; move it or choose another output_dir",
    }
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own class with the system's text
        code = getattr(error, "errno", None) or next((c for c in remedies if os.strerror(c) in str(error)), None)
        if code not in remedies or not (code in (errno.ENOSPC, errno.EDQUOT) or concerns(error, path)):
            raise
        raise UserError(f"cannot write {path}: {remedies[code]}") from error


def concerns(error: Exception, path: Path) -> bool:
    """Whether an error names `path`, a parent folder, something inside it, or a scratch name made from it."""
    path = path.absolute()
    for name in filter(None, (getattr(error, "filename", None), getattr(error, "filename2", None))):
        named = Path(str(name)).absolute()
        own = [part.name.removeprefix(".") for part in (named, *named.parents) if part.parent == path.parent]
        if named in path.parents or any(f"{part}.".startswith(f"{path.name}.") for part in own):
            return True
    return False


@contextlib.contextmanager
def parent_folders(path: Path) -> Iterator[None]:
    """Create the parent folders of `path`. On failure, delete those that this call created and that are empty."""
    made = [folder for folder in path.parents if not folder.exists()]
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # e.g. in /proc
            raise UserError(
                f"cannot write {path}: no folder can be created there; choose another output_dir"
            ) from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a folder with contents stays, and so do its parents
            for folder in made:
                folder.rmdir()
        raise


@contextlib.contextmanager
def exclusive(lock: Path, folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `lock`, so that no other process works in `folder` during the block.

    The kernel releases the lock when this process ends.

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
                raise UserError(f"another process is at work in {folder}; wait for it to end, or stop it") from error
            except OSError as error:  # e.g. NFS or Lustre mounted without locks
                say(f"{lock}: cannot be locked ({error.strerror}); make sure that no other process works in {folder}")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                    break  # otherwise its last holder deleted this file between open and flock: lock the new one
        stack.callback(lock.unlink, missing_ok=True)
        yield


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty scratch file next to `path`. On success it is fsynced and renamed to `path`, on failure deleted.

    Scratch files that killed processes left for `path` are deleted too. A lock marks those that are still being written.
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
    """Give `file` the permissions that the umask allows: safetensors creates files with mode 0600.

    Args:
        mode: of a file or folder that this process has just created next to it, under the same umask.
    """
    found = file.lstat()
    wanted = found.st_mode | (mode & 0o666)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and wanted != found.st_mode:
        file.chmod(stat.S_IMODE(wanted))


def locked_scratch(path: Path) -> tuple[Path, int]:
    """A new empty scratch file for `path`, and the descriptor that holds its lock until it is closed."""
    while True:
        scratch = partial_path(path)
        lock = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # NFS or Lustre without locks: then no other process deletes it either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if scratch.exists():
            return scratch, lock
        os.close(lock)  # another process deleted it as a leftover, between open and flock


def remove_scratch_files(folder: Path, pattern: str = f"*{PARTIAL}*") -> None:
    """Delete the scratch files of killed processes in `folder`. Files that a live process has locked stay."""
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError):  # locked, a folder, or already deleted
            lock = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(lock)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty scratch folder next to `path`. On success its files are fsynced and it replaces `path`.

    An existing `path` is renamed first and deleted last. A kill at any moment leaves the old folder or the new one,
    never a mixture; `recover` restores an old one that had only been renamed.
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


def readable_folder(path: Path) -> Path:
    """Where to read the folder `path`: its old version if a kill came between the two renames (see `recover`)."""
    old = path.with_name(path.name + REPLACED)
    return old if old.exists() and not path.exists() else path


def recover(path: Path) -> None:
    """Clean up after killed runs: restore a finished folder that was being replaced, delete scratch files and folders.

    Call this only from the process that holds the stage's lock: it would delete another process's unfinished work.
    """
    old = path.with_name(path.name + REPLACED)
    if old.exists():
        shutil.rmtree(old) if path.exists() else os.replace(old, path)
    for leftover in unfinished(path):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    remove_scratch_files(path)


def set_folder_aside(path: Path) -> bool:
    """Rename `path` so that `recover` can restore it and `drop_replaced` delete it; False for a link or a mount."""
    if path.is_symlink() or path.is_mount():
        return False
    os.replace(path, path.with_name(path.name + REPLACED))
    return True


def drop_replaced(path: Path) -> None:
    """Delete the old version of `path` that `set_folder_aside` kept."""
    shutil.rmtree(path.with_name(path.name + REPLACED), ignore_errors=True)


def unfinished(path: Path) -> list[Path]:
    """Existing scratch files and folders for `path`."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}{PARTIAL}*"))


def remove_folder(path: Path, *, first: str, last: str) -> None:
    """Delete a folder as far as permissions allow: its file `first` before the others, its file `last` after them.

    After a kill in between, the folder no longer counts as finished (without `first`), but still as this program's
    (with `last`).
    """
    for item in sorted(path.glob("*"), key=lambda item: (item.name == last) - (item.name == first)):
        with contextlib.suppress(OSError):
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    with contextlib.suppress(OSError):  # a mount or a link
        path.rmdir()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN and infinities raise ValueError: they are not JSON."""
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
