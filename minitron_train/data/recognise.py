"""The format of a text source's file: by its name, or by its first bytes if the name does not show it."""

import json
import re
from pathlib import Path

from minitron_train.config import SourceKind
from minitron_train.data.packed import HEAD_BYTES, head, suffixes

SUFFIXES = {  # in lower case, without compression and shard numbers
    SourceKind.jsonl: (".jsonl", ".jsonlines", ".ndjson", ".jl", ".json"),
    SourceKind.parquet: (".parquet", ".pq"),
    SourceKind.csv: (".csv", ".tsv"),
    SourceKind.arrow: (".arrow", ".feather"),
    SourceKind.bin: (".idx",),
    SourceKind.text: (".txt", ".md", ".rst", ".py", ".text", ".raw", ".tokens"),
}
BY_NAME = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
NEVER_TEXT = frozenset(  # whatever their content: markup, archives, documents, tensors
    ".htm .html .xhtml .xml .svg .rtf .pdf .ps .tar .tgz .zip .7z .rar .docx .odt .epub .bin .pt .pkl .npy".split()
)
MAYBE_JSON = frozenset({".txt", ".text", ".raw"})  # often JSON Lines under a name of plain text
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OBJECT = re.compile(rb'\s*(\[\s*)?\{\s*("|\})')  # a JSON object, or an array of them


def kind_by_name(path: Path) -> SourceKind | None:
    """The format according to the file name; None if it does not show one."""
    return BY_NAME.get(suffixes(path)[0])


def kind_of(path: Path) -> SourceKind | None:
    """The format of a file, by name; by content if the name shows none or plain text. None if the file holds no text.

    Raises:
        UserError: the file cannot be read.
    """
    suffix = suffixes(path)[0]
    kind = BY_NAME.get(suffix)
    if suffix in MAYBE_JSON:
        return SourceKind.jsonl if begins_with_an_object(head(path)) else kind
    return kind if kind or suffix in NEVER_TEXT else kind_by_content(head(path))


def kind_by_content(start: bytes) -> SourceKind | None:
    """The format according to the first 4 kB; None for content that is neither text nor a known format."""
    if start.startswith(b"PAR1"):
        return SourceKind.parquet
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return SourceKind.arrow
    if not is_text(start) or start.removeprefix(BOM).lstrip().startswith((b"<", b"%PDF", b"{\\rtf")):
        return None
    return SourceKind.jsonl if OBJECT.match(start.removeprefix(BOM)) else SourceKind.text


def is_text(start: bytes) -> bool:
    """Whether the first 4 kB of a file are UTF-8 without NUL; the last character may be cut off."""
    if b"\0" in start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return len(start) >= HEAD_BYTES and error.start >= len(start) - 3
    return True


def begins_with_an_object(start: bytes) -> bool:
    """Whether the first line is a JSON object, as far as the first 4 kB show."""
    line, newline, _ = start.removeprefix(BOM).lstrip().partition(b"\n")
    if not newline and len(start) >= HEAD_BYTES:
        return re.match(rb'\{\s*"[^"\\]*"\s*:', line) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def encoding_fault(start: bytes) -> str | None:
    """Why the first 4 kB of a text file cannot be read as UTF-8 text, with the remedy; None if they can."""
    if start.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    if start.startswith(UTF16):
        return "is UTF-16, not UTF-8; convert the file (iconv -f utf-16 -t utf-8)"
    if b"\0" in start:
        half = start.count(b"\0") * 3 > len(start)
        what = "is UTF-16, not UTF-8; convert the file (iconv -f utf-16le -t utf-8)" if half else ""
        return what or "is binary, not text (it has NUL bytes); take it out of the data"
    return None
