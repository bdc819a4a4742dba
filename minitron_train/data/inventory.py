"""The inventory of a data path: which files are read, their formats and sizes, and what is left out and why."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from minitron_train.config import SourceKind
from minitron_train.data.discover import FileId, LeftOut, Listing, file_id, file_size, find, is_special
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
MODEL_FILES = (  # left out in a folder with config.json
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
NAMES_SHOWN = 2  # per reason


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The files of one data path."""

    pattern: str
    kinds: dict[Path, SourceKind]  # format of each file that is read, sorted by file name
    left_out: tuple[LeftOut, ...]

    @cached_property
    def files(self) -> list[Path]:
        """The files that are read, sorted. A .bin/.idx pair counts as its .idx file."""
        return list(self.kinds)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the files; for a pair, those of its .bin."""
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
    """What is left out, grouped by reason, with the first names of each."""
    names: dict[str, list[str]] = {}
    for item in left_out:
        names.setdefault(item.reason, []).append(item.name)
    return ", ".join(
        ", ".join(found[:NAMES_SHOWN]) + (f" and {more:,} more" if (more := len(found) - NAMES_SHOWN) > 0 else "")
        + f" ({reason})"
        for reason, found in names.items()
    )  # fmt: skip


def take(
    pattern: str,
    kind: SourceKind = SourceKind.auto,
    *,
    split: str = "train",
    held_out: Collection[FileId] = frozenset(),
) -> Inventory:
    """The inventory of a file name, a folder or a glob. Files are opened only if their names do not show the format.

    Args:
        kind: the format of all files; `auto` recognises it by name and content.
        split: which split of a downloaded data set is read. `train` includes files that belong to no split, and is
            everything if the files of other splits are all there is; `all` is every split.
        held_out: files of the validation set, which are left out.

    Raises:
        UserError: no file is left, the path cannot be read, or it has no such split.
    """
    try:
        listing = find(pattern)
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
            raise UserError(f"{pattern}: is not a regular file; write its content into a file, and give that")
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


def recognise(listing: Listing, kind: SourceKind) -> dict[Path, SourceKind]:
    """The format of each file. Files without one, and files about the data, are left out of the listing."""
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
    """The format of one file. In a folder only the name counts, since the user did not name the file."""
    if listing.from_folder and not kind_by_name(path):
        return None
    return kind_of(path)


def join_pairs(listing: Listing) -> None:
    """Replace each .bin file by its .idx, and leave out Arrow files that state.json of a saved data set does not name."""
    tokens = {path for path in listing.files if path.suffix == ".bin"}
    lonely = {path for path in tokens if not path.with_suffix(".idx").is_file()}
    listing.keep([path for path in listing.files if path not in lonely], "no .idx file")
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
    """Leave out the configuration and the tokenizer of a model in a data folder."""
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
    """Leave out files about the data. If all data are plain text, such files count as text too."""
    script = f"{listing.base.resolve().name.lower()}.py"  # a loading script is named after its repository
    others = [path for path in listing.files if not is_about_data(path) and path.name.lower() != script]
    if any(kinds[path] is not SourceKind.text for path in others):
        wanted = others
    else:
        wanted = [path for path in listing.files if kinds[path] is SourceKind.text]
    if listing.from_folder and wanted:
        listing.keep(wanted, "about the data")


def is_about_data(path: Path) -> bool:
    """Whether a file describes the data, by its name in upper or lower case."""
    return any(fnmatch(path.name.lower(), pattern) for pattern in ABOUT_DATA)


def held_out_split(pattern: str) -> str:
    """The split that is read of a validation path: validation or test if it has one, otherwise that of `train`."""
    splits = Counter(item.reason.removeprefix("split ") for item in take(pattern).left_out)
    return next((split for split in ("validation", "test") if splits[split]), "train")


def leave_out_held(listing: Listing, held_out: Collection[FileId], pattern: str) -> None:
    """Leave out the files of the validation set."""
    if not held_out:
        return
    others = [path for path in listing.files if file_id(path) not in held_out]
    if listing.files and not others:
        raise UserError(
            f"{pattern}: every file is held out by data.validation_path; give data.path or data.validation_path other files"
        )
    listing.keep(others, "held out as data.validation_path")


def is_index(path: Path) -> bool:
    """Whether a path is the index of a .bin/.idx pair."""
    return path.suffix == ".idx"
