"""What a data path stands for: the files that are read, their formats and bytes, and what is left out and why."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from glob import escape, glob, has_magic
from pathlib import Path

from minitron_train.config import SourceKind
from minitron_train.data.packed import suffixes
from minitron_train.data.recognise import kind_by_name, kind_of
from minitron_train.data.splits import choose_split
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import byte_size
from minitron_train.runtime.records import read_record

ABOUT_DATA = (
    "dataset_info*.json",
    "dataset_dict.json",
    "state.json",
    "*.md",
    "readme*.txt",
    "readme*.rst",
    "license*.txt",
)
MODEL_FILES = (  # in a folder with config.json
    "*config.json",
    "*.safetensors.index.json",
    "*_map.json",
    "tokenizer.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*.jinja",
    "provenance.json",
)
READ_ALREADY = "read already under another name"
NAMES_SHOWN = 2  # for each reason

FileId = tuple[int, int]  # device and inode


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not read."""

    name: str  # relative to the path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The files of one data path."""

    pattern: str
    kinds: dict[Path, SourceKind]  # of the files that are read, in the order of their names
    left_out: tuple[LeftOut, ...]

    @cached_property
    def files(self) -> list[Path]:
        """The files that are read, sorted. A .bin/.idx pair counts as its .idx file."""
        return list(self.kinds)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the files; of a pair, of its tokens."""
        return sum(file_size(path.with_suffix(".bin") if is_index(path) else path) for path in self.files)

    def summary(self) -> str:
        """`12 files, jsonl, 3.1 GB; left out: README.md (about the data), test.jsonl (split test)`."""
        kinds = ", ".join(sorted({kind.value for kind in self.kinds.values()}))
        packed = sorted({packing for path in self.files if (packing := suffixes(path)[1])})
        noun = "pair" if set(self.kinds.values()) == {SourceKind.bin} else "file"
        count = f"{len(self.files):,} {noun}{'s' * (len(self.files) != 1)}"
        line = f"{count}, {' '.join([kinds, *packed])}, {byte_size(self.size_bytes)}"
        return f"{line}; left out: {shown(self.left_out)}" if self.left_out else line


def shown(left_out: Collection[LeftOut]) -> str:
    """What is left out, by reason, with the first names of each."""
    names: dict[str, list[str]] = {}
    for item in left_out:
        names.setdefault(item.reason, []).append(item.name)
    return ", ".join(
        ", ".join(found[:NAMES_SHOWN]) + (f" and {more:,} more" if (more := len(found) - NAMES_SHOWN) > 0 else "")
        + f" ({reason})"
        for reason, found in names.items()
    )  # fmt: skip


@dataclass
class Listing:
    """Files on their way into an inventory: those that are still read, and those that are left out."""

    base: Path  # names are relative to it
    from_folder: bool  # a whole folder was given, not a glob or a file
    files: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """The name of a file for the user."""
        name = os.path.relpath(path, self.base) if path != self.base else path.name
        return name.encode(errors="backslashreplace").decode()

    def leave_out(self, path: Path, reason: str) -> None:
        """Do not read this file or folder."""
        is_folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where the system tells nothing
        self.left_out.append(LeftOut(self.name(path) + "/" * is_folder, reason))

    def keep(self, wanted: Collection[Path], reason: str) -> None:
        """Leave out all files but the wanted ones."""
        kept = set(wanted)
        for path in self.files:
            if path not in kept:
                self.leave_out(path, reason)
        self.files = [path for path in self.files if path in kept]


def take(
    pattern: str,
    kind: SourceKind = SourceKind.auto,
    *,
    split: str = "train",
    held_out: Collection[FileId] = frozenset(),
) -> Inventory:
    """The inventory of a file name, a folder or a glob; files are opened only where their names do not tell the format.

    Args:
        kind: the format of all files; `auto` goes by name and content.
        split: the split of a downloaded data set that is read. `train` reads all files that belong to no other split
            too, and everything if nothing else is there; `all` reads every split.
        held_out: files that are the validation set and are not read here.

    Raises:
        UserError: nothing is left to read, the path cannot be looked at, or it has no such split.
    """
    try:
        listing = look(pattern)
        leave_out_models(listing)
        kinds = recognise(listing, kind)
        choose_split(listing, kinds, split, pattern)
        leave_out_held(listing, held_out, pattern)
        empty = not any(file_size(path) for path in listing.files)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{pattern[:200]}: cannot be read ({reason}); give a readable file, folder or glob") from error
    if not listing.files:
        if is_special(Path(pattern).expanduser()):
            raise UserError(f"{pattern}: is not a regular file; write what it gives into a file, and give that")
        if not listing.left_out:
            raise UserError(f"{pattern}: no text file matches; give an existing file, folder or quoted glob")
        raise UserError(
            f"{pattern}: no text file matches, {shown(listing.left_out)}; give text, JSON Lines, CSV, Parquet, Arrow or "
            ".bin/.idx files, or set data.sources.NAME.kind"
        )
    if empty:
        raise UserError(f"{pattern}: the corpus is empty (0 bytes in {len(listing.files)} files); give one with text")
    files = sorted(listing.files)
    return Inventory(pattern=pattern, kinds={path: kinds[path] for path in files}, left_out=tuple(listing.left_out))


def look(pattern: str) -> Listing:
    """The files that a pattern stands for, before anything is known of their formats."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        return below(path)
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
    listing.files = unlinked(listing, [file for file in found if file.is_file()])
    return listing


def root_of(pattern: str) -> Path | None:
    """The folder all of which is read, resolved; None for a file, a pair, or a glob that stays in one folder."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or not has_magic(pattern):
        return None
    literal, rest = literal_part(path)
    return literal.resolve() if "**" in rest else None


def literal_part(path: Path) -> tuple[Path, str]:
    """The folders of a glob that exist by their very name, brackets and all, and the rest of it."""
    literal = Path(path.anchor or ".")
    parts = list(path.parts[1 if path.anchor else 0 :])
    while len(parts) > 1 and (literal / parts[0]).is_dir():
        literal /= parts.pop(0)
    return literal, "/".join(parts)


def below(folder: Path) -> Listing:
    """All files below a folder: linked folders are followed once, hidden names are left out."""
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
    listing.files = unlinked(listing, sorted(files))
    return listing


def children(listing: Listing, folder: Path) -> Iterator[Path]:
    """What a folder holds, by name; a folder below the first that cannot be read is left out."""
    try:
        yield from sorted(folder.iterdir())
    except OSError as error:
        if folder == listing.base:
            raise
        listing.leave_out(folder, f"cannot be read: {error.strerror}")


def refused(path: Path) -> str | None:
    """Why the system tells nothing about a file, in a folder that may be listed but not entered; None if it does."""
    try:
        path.stat()
    except PermissionError as error:
        return error.strerror
    except OSError:
        return None
    return None


def unlinked(listing: Listing, files: list[Path]) -> list[Path]:
    """The files without links to others of them, so that no text is read twice."""
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


def recognise(listing: Listing, kind: SourceKind) -> dict[Path, SourceKind]:
    """The format of each file; what has none, or is about the data beside it, leaves the listing."""
    join_pairs(listing)
    if kind is not SourceKind.auto:
        named = [path for path in listing.files if kind_by_name(path) is kind] or listing.files
        listing.keep(named if listing.from_folder else listing.files, f"not {kind.value}")
        leave_out_about(listing, dict.fromkeys(listing.files, kind))
        return dict.fromkeys(listing.files, kind)
    kinds = {path: found for path in listing.files if (found := kind_in(listing, path))}
    if listing.from_folder:
        bare = [path for path in listing.files if path not in kinds and not suffixes(path)[0] and file_size(path)]
        guessed = {path: found for path in bare if (found := kind_of(path))}
        certain = {path: found for path, found in guessed.items() if found is not SourceKind.text}
        kinds |= certain if kinds or certain else guessed
    listing.keep(kinds, "not a format that is read")
    leave_out_about(listing, kinds)
    return {path: kinds[path] for path in listing.files}


def kind_in(listing: Listing, path: Path) -> SourceKind | None:
    """The format of one file; in a folder, only names count, since nobody asked for this file."""
    if listing.from_folder and not kind_by_name(path):
        return None
    return kind_of(path)


def join_pairs(listing: Listing) -> None:
    """Take the .idx for each .bin file, and leave out what is not in state.json of a saved data set."""
    tokens = {path for path in listing.files if path.suffix == ".bin"}
    lonely = {path for path in tokens if not path.with_suffix(".idx").is_file()}
    listing.keep([path for path in listing.files if path not in lonely], "no .idx beside it")
    listing.files = list(dict.fromkeys(path.with_suffix(".idx") if path in tokens else path for path in listing.files))
    saved = [path for path in listing.files if path.suffix == ".arrow" or path.name == "dataset_info.json"]
    for state in {path.parent / "state.json" for path in saved}:
        if state.is_file():
            named = saved_files(state)
            beside = {path for path in listing.files if path.parent == state.parent and path.suffix == ".arrow"}
            others = {path for path in beside if path.name not in named}
            listing.keep([path for path in listing.files if path not in others], "not in state.json")
            if lost := sorted(name for name in named if not (state.parent / name).is_file()):
                raise UserError(f"{state.parent / lost[0]}: missing, state.json names it; copy the whole folder again")


def saved_files(state: Path) -> set[str]:
    """The Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote."""
    record = read_record(state, dict[str, object], "save the data set again")
    rows = record.get("_data_files")
    names = [row.get("filename") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {name for name in names if isinstance(name, str)}


def leave_out_models(listing: Listing) -> None:
    """Leave out the configuration and the tokenizer of a model that lies in a folder of the data."""
    if not listing.from_folder:
        return
    models = {path.parent for path in listing.files if path.name == "config.json"}
    of_model = {
        path
        for path in listing.files
        if path.parent in models and any(fnmatch(path.name.lower(), pattern) for pattern in MODEL_FILES)
    }
    listing.keep([path for path in listing.files if path not in of_model], "of a model")


def leave_out_about(listing: Listing, kinds: dict[Path, SourceKind]) -> None:
    """Leave out what tells about the data beside it; where there is no other data than text, that is text too."""
    script = f"{listing.base.resolve().name.lower()}.py"  # a loading script has the name of its repository
    others = [path for path in listing.files if not is_about_data(path) and path.name.lower() != script]
    if any(kinds[path] is not SourceKind.text for path in others):
        wanted = others
    else:
        wanted = [path for path in listing.files if kinds[path] is SourceKind.text]
    if listing.from_folder and wanted:
        listing.keep(wanted, "about the data")


def is_about_data(path: Path) -> bool:
    """Whether a file tells about the data beside it, by its name in any case."""
    return any(fnmatch(path.name.lower(), pattern) for pattern in ABOUT_DATA)


def held_out_split(pattern: str) -> str:
    """The split of a validation path that is read: validation or test if there is one, else what `train` reads."""
    splits = Counter(item.reason.removeprefix("split ") for item in take(pattern).left_out)
    return next((split for split in ("validation", "test") if splits[split]), "train")


def leave_out_held(listing: Listing, held_out: Collection[FileId], pattern: str) -> None:
    """Leave out the files that are the validation set."""
    if not held_out:
        return
    others = [path for path in listing.files if file_id(path) not in held_out]
    if listing.files and not others:
        raise UserError(
            f"{pattern}: every file is held out by data.validation_path; give data.path or data.validation_path other files"
        )
    listing.keep(others, "held out as data.validation_path")


def file_id(path: Path) -> FileId:
    """The same for all names and links of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def file_size(path: Path) -> int:
    """Bytes of a file; 0 if it is missing."""
    return path.stat().st_size if path.exists() else 0


def is_special(path: Path) -> bool:
    """Whether a path is a pipe, a socket or a device."""
    return path.exists() and not path.is_dir() and not path.is_file()


def is_index(path: Path) -> bool:
    """Whether a path is the index of a .bin/.idx pair."""
    return path.suffix == ".idx"


def with_suffix_added(path: Path, suffix: str) -> Path | None:
    """PATH.suffix if it is a file."""
    longer = Path(f"{path}{suffix}")
    return longer if longer.is_file() else None
