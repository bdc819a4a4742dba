"""Find the files that a data path stands for, before their formats are known."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from glob import escape, glob, has_magic
from pathlib import Path

READ_ALREADY = "read already under another name"

FileId = tuple[int, int]  # device and inode


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not read."""

    name: str  # relative to the path
    reason: str


@dataclass
class Listing:
    """The files found so far: those that will be read, and those that are left out."""

    base: Path  # names are relative to it
    from_folder: bool  # a whole folder was given, not a glob or a file
    files: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """A file's name for messages, relative to `base`."""
        name = os.path.relpath(path, self.base) if path != self.base else path.name
        return name.encode(errors="backslashreplace").decode()

    def leave_out(self, path: Path, reason: str) -> None:
        """Leave out this file or folder."""
        is_folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises without permission
        self.left_out.append(LeftOut(self.name(path) + "/" * is_folder, reason))

    def keep(self, wanted: Collection[Path], reason: str) -> None:
        """Leave out all files but the wanted ones."""
        kept = set(wanted)
        for path in self.files:
            if path not in kept:
                self.leave_out(path, reason)
        self.files = [path for path in self.files if path in kept]


def find(pattern: str) -> Listing:
    """The files of a file name, a folder, the prefix of a .bin/.idx pair, or a glob."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        return files_below(path)
    if path.is_file():
        return Listing(path.parent, False, [path])
    if index := with_suffix_added(path, ".idx"):  # Megatron names a pair by its prefix
        return Listing(path.parent, False, [index])
    if path.exists() or not has_magic(pattern):
        listing = Listing(path.parent, False)
        if path.exists():
            listing.leave_out(path, "not a regular file")
        return listing
    literal, rest = literal_part(path)
    listing = Listing(literal, False)
    found = [Path(name) for name in sorted(glob(f"{escape(str(literal))}/{rest}", recursive=True))]  # noqa: PTH207
    listing.files = without_links(listing, [file for file in found if file.is_file()])
    return listing


def root_of(pattern: str) -> Path | None:
    """The folder that is read with its subfolders, resolved. None for a file, a pair, or a glob without **."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or not has_magic(pattern):
        return None
    literal, rest = literal_part(path)
    return literal.resolve() if "**" in rest else None


def literal_part(path: Path) -> tuple[Path, str]:
    """Split a glob into leading folders that exist under their literal name, even with brackets, and the rest."""
    literal = Path(path.anchor or ".")
    parts = list(path.parts[1 if path.anchor else 0 :])
    while len(parts) > 1 and (literal / parts[0]).is_dir():
        literal /= parts.pop(0)
    return literal, "/".join(parts)


def files_below(folder: Path) -> Listing:
    """All files below a folder. Linked folders are followed once; hidden names are left out."""
    listing = Listing(folder, True)
    files, seen = [], {file_id(folder)}
    waiting, linked = [folder], []
    while waiting or linked:
        inner = waiting.pop() if waiting else linked.pop(0)
        if inner.is_symlink() and inner != folder:
            if file_id(inner) in seen:
                listing.leave_out(inner, READ_ALREADY)
                continue
            seen.add(file_id(inner))
        for path in children(listing, inner):
            if reason := refused(path):
                listing.leave_out(path, f"cannot be read: {reason}")
            elif path.name.startswith(".") or path.name == "__pycache__":
                listing.leave_out(path, "hidden" if path.name.startswith(".") else "not text")
            elif path.is_dir() and path.is_symlink():
                linked.append(path)
            elif path.is_dir() and file_id(path) in seen:
                listing.leave_out(path, READ_ALREADY)
            elif path.is_dir():
                seen.add(file_id(path))
                waiting.append(path)
            elif path.is_file():
                files.append(path)
            else:
                listing.leave_out(path, "a broken link" if path.is_symlink() else "not a regular file")
    listing.files = without_links(listing, sorted(files))
    return listing


def children(listing: Listing, folder: Path) -> Iterator[Path]:
    """The entries of a folder, sorted. A subfolder that cannot be read is left out."""
    try:
        yield from sorted(folder.iterdir())
    except OSError as error:
        if folder == listing.base:
            raise
        listing.leave_out(folder, f"cannot be read: {error.strerror}")


def refused(path: Path) -> str | None:
    """Why stat is not permitted, in a folder that may be listed but not entered; None if it is."""
    try:
        path.stat()
    except PermissionError as error:
        return error.strerror
    except OSError:
        return None
    return None


def without_links(listing: Listing, files: list[Path]) -> list[Path]:
    """The files without links to other files among them, so that no text is read twice."""
    through_links = {path for path in files if Path(os.path.realpath(path)) != path.absolute()}
    seen = {os.path.realpath(path) for path in files if path not in through_links}
    kept = []
    for path in files:
        if path in through_links:
            target = os.path.realpath(path)
            if target in seen:
                listing.leave_out(path, READ_ALREADY)
                continue
            seen.add(target)
        kept.append(path)
    return kept


def file_id(path: Path) -> FileId:
    """Device and inode: the same for all names and links of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def file_size(path: Path) -> int:
    """Bytes of a file; 0 if it is missing."""
    return path.stat().st_size if path.exists() else 0


def is_special(path: Path) -> bool:
    """Whether a path is a pipe, a socket or a device."""
    return path.exists() and not path.is_dir() and not path.is_file()


def with_suffix_added(path: Path, suffix: str) -> Path | None:
    """The path with `suffix` appended, if that is a file."""
    longer = Path(f"{path}{suffix}")
    return longer if longer.is_file() else None
