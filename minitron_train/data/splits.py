"""Splits of a downloaded data set: which split a file name belongs to, and which split is read."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_train.config import SourceKind
from minitron_train.data.packed import suffixes
from minitron_train.runtime.errors import UserError

if TYPE_CHECKING:
    from minitron_train.data.discover import Listing

SPLITS = {  # names that the hub's data sets use (datasets.data_files.SPLIT_KEYWORDS)
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
ALL_SPLITS = "all"
SPLIT_TEXT = frozenset({".txt", ".text", ".raw", ".tokens"})  # suffixes of plain text in which data sets are published


def split_of(name: str) -> str | None:
    """The split that a relative path names, by the hub's rules: the file name first, then the nearest folder.

    In a file name it is one of the words (`test-00000-of-00002.parquet`, `wiki.valid.tokens`); in a folder, the only one.
    """
    file, *folders = reversed(Path(name.lower()).parts)
    words = [word for word in re.split(r"[-._ 0-9]+", file) if word]
    found = [SPLIT_OF[word] for word in words if word in SPLIT_OF]
    return next(iter(found), None) or next(
        (SPLIT_OF[word] for folder in folders if (word := folder.strip("-._ 0123456789")) in SPLIT_OF), None
    )


def choose_split(listing: "Listing", kinds: dict[Path, SourceKind], split: str, pattern: str) -> None:
    """Keep one split of a downloaded data set. Notes and code with such names do not count as splits."""
    splits = {
        path: split_of(listing.name(path))
        for path in listing.files
        if kinds[path] is not SourceKind.text or suffixes(path)[0] in SPLIT_TEXT
    }
    wanted = SPLIT_OF.get(split, split)
    if split == ALL_SPLITS:
        return
    if wanted != "train":
        kept = [path for path in listing.files if splits.get(path) == wanted]
        if not kept:
            available = (
                ", ".join(sorted({found or "files without a split" for found in splits.values()})) or "no splits"
            )
            raise UserError(
                f"{pattern}: no file of split {split}; it has {available}; choose another split, or {ALL_SPLITS}"
            )
        listing.keep(kept, f"not split {wanted}")
        return
    if "train" not in splits.values():  # text files may have any name
        splits = {path: found for path, found in splits.items() if kinds[path] is not SourceKind.text}
    if all(splits.get(path) not in (None, "train") for path in listing.files):
        return
    for other in ("validation", "test"):
        listing.keep([path for path in listing.files if splits.get(path) != other], f"split {other}")
