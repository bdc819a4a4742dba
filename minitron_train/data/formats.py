"""Text sources as blocks: every format has `num_blocks`, `block_bytes`, `read(block)` -> documents, `fingerprint`.

A block is a small deterministic part of the source (about 32 kB of lines, a row group, a few modules) that can be read
without the blocks before it. So shuffling and resuming work on block numbers. All classes can be pickled: the
tokenising processes read their blocks themselves.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import pyarrow
import pyarrow.parquet

from minitron_train.data import corpus, identity, packed, rows
from minitron_train.data.lines import (
    BLOCK_BYTES,
    PIECE_BYTES,
    WORD_BYTES,
    CopiedLines,
    PlainLines,
    PlainText,
    copy_of,
    decompressed_lines,
    make_copies,
    make_copy,
    open_lines,
    sample_sha256,
    short_lines,
    word_start,
)
from minitron_train.data.recognise import BOM, encoding_fault
from minitron_train.runtime.console import progress
from minitron_train.runtime.errors import UserError, first_line

PASSAGE_BYTES = 4096  # a text file is held out in passages of this size
ROW_GROUP_BYTES = 1 << 24  # Parquet files with larger row groups are copied into blocks
COUNTED_BYTES = 1 << 30  # a wrong line within this size of its file is reported with its line number


class TextFormat(Protocol):
    """Random access to a source's documents."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int:
        """Typical size of a block's text; decides how many are tokenised together."""
        ...

    def read(self, block: int) -> Iterator[Sequence[str]]:
        """The block's documents, each as a sequence of passages; each passage is held out or not."""
        ...

    def fingerprint(self) -> str:
        """sha256 that changes when the documents do."""
        ...


def combine(hashes: Sequence[str]) -> str:
    """One sha256 over several."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """Base class of formats over several files: block numbers run through all files, in the order of `paths`."""

    paths: tuple[Path, ...]
    text_key: str = "text"
    cache_dir: Path

    @cached_property
    def ends(self) -> list[int]:
        """Number of blocks up to and including each file."""
        return list(accumulate(file.num_blocks for file in self.files))

    @cached_property
    def files(self) -> "Sequence[PlainLines | CopiedLines | RowGroups]":
        """Block readers of the files. Missing seekable copies are written here."""
        files = [self.open(path) for path in self.paths]
        make_copies([file for file in files if isinstance(file, CopiedLines)], self.lines_to_copy)
        return files

    def open(self, path: Path) -> "PlainLines | CopiedLines | RowGroups":
        """Block reader of one UTF-8 file; its seekable copy may not exist yet.

        Raises:
            UserError: the file begins like UTF-16, binary data or a Git LFS pointer.
        """
        file = open_lines(path, self.cache_dir)
        if fault := encoding_fault(packed.head(path)):
            raise UserError(f"{path}: {fault}")
        return file

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        """All lines of a file that cannot be read in any order."""
        return decompressed_lines(path)

    @property
    def num_blocks(self) -> int:
        return self.ends[-1]

    @property
    def block_bytes(self) -> int:
        return max(1, sum(file.size_bytes for file in self.files) // max(1, self.num_blocks))

    def locate(self, block: int) -> tuple[int, int]:
        """Which file holds the block, and its number there."""
        file = bisect_right(self.ends, block)
        return file, block - (self.ends[file - 1] if file else 0)

    def fingerprint(self) -> str:
        return combine([record.sha256 for record in identity.records_of(self.paths)])


@dataclass(frozen=True, kw_only=True)
class JsonLines(FileFormat):
    """JSON Lines, or files of one JSON array: each object is a document, its text in the column `text_key`."""

    def open(self, path: Path) -> "PlainLines | CopiedLines | RowGroups":
        """A file of one JSON array is copied into blocks: it may be a single line."""
        file = super().open(path)
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), "array"])) if is_array(path) else file

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        return rows.array_lines(path) if is_array(path) else super().lines_to_copy(path)

    def read(self, block: int) -> Iterator[Sequence[str]]:
        file, inner = self.locate(block)
        for number, line in enumerate(self.files[file].read(inner)):
            if line.strip():
                try:
                    text = text_of(line, self.text_key)
                except ValueError as error:
                    raise UserError(f"{self.place(file, inner, number)}: {error}") from error
                yield [text]

    def fingerprint(self) -> str:
        return combine([super().fingerprint(), self.text_key])

    def place(self, file: int, block: int, number: int) -> str:
        """File and line for a message; the block instead of the line where counting would take minutes."""
        path, reader = self.paths[file], self.files[file]
        if block * BLOCK_BYTES > COUNTED_BYTES:
            return f"{path}, block {block:,} of {reader.num_blocks:,}"
        return f"{path}, line {sum(len(list(reader.read(i))) for i in range(block)) + number + 1:,}"


def is_array(path: Path) -> bool:
    """Whether a file begins like a JSON array."""
    return packed.head(path).removeprefix(BOM).lstrip().startswith(b"[")


def text_of(line: bytes, text_key: str) -> str:
    """The text of one JSON object; null is an empty text.

    Raises:
        ValueError: it has none; the caller adds the file to the message.
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 near {line[error.start : error.start + 8]!r}; convert the file") from error
    except RecursionError as error:
        raise ValueError(f"nested too deeply: {line[:60]!r}; take the line out") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {line[:60]!r}; each line must be one (is the file cut off?)") from error
    except ValueError as error:  # a number of over 4300 digits
        raise ValueError(f"cannot be parsed ({first_line(error)}): {line[:60]!r}; take the line out") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {line[:60]!r}; each line must be one")
    if text_key not in row:
        raise ValueError(rows.no_column(text_key, ", ".join(row)))
    text = row[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"column {text_key} is not text: {str(text)[:60]}; choose another text_key")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, such as "\\ud83d": JSON allows it, UTF-8 does not
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text


@dataclass(frozen=True, kw_only=True)
class TextFiles(FileFormat):
    """Plain text: a file is one document. A longer one gives a document per 32 kB, split at line ends or between words."""

    def open(self, path: Path) -> "PlainLines | CopiedLines | RowGroups":
        file = super().open(path)
        return PlainText(file.path, file.size_bytes) if isinstance(file, PlainLines) else file

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        return short_lines(decompressed_lines(path, cut_bytes=PIECE_BYTES))

    def read(self, block: int) -> Iterator[Sequence[str]]:
        file, inner = self.locate(block)
        text = b"".join(line.removesuffix(b"\r") + b"\n" for line in self.files[file].read(inner))
        text = text if inner else text.removeprefix(BOM)
        try:
            texts = [piece.decode() for piece in passages(text) if piece.strip()]
        except UnicodeDecodeError as error:
            raise rows.not_utf8(self.paths[file], error) from error
        if texts:
            yield texts


def passages(text: bytes) -> Iterator[bytes]:
    """Split UTF-8 text into passages of at least 4 kB. They end with a line, or with a word if the line is over 4 kB."""
    start = 0
    while start < len(text):
        least = start + PASSAGE_BYTES
        end = text.find(b"\n", least - 1, least + PASSAGE_BYTES) + 1
        if not end:
            end = least + word_start(text[least : least + WORD_BYTES])
        yield text[start:end]
        start = end


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Blocks of a Parquet file: its row groups."""

    path: Path
    text_key: str
    sizes: tuple[int, ...]  # bytes of each group's text

    @classmethod
    def of(cls, path: Path, text_key: str, metadata: pyarrow.parquet.FileMetaData) -> "RowGroups":
        """The row groups of a file with this footer."""
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        texts = [
            [chunk for i in range(group.num_columns) if (chunk := group.column(i)).path_in_schema == text_key]
            for group in groups
        ]
        return cls(path, text_key, tuple(sum(chunk.total_uncompressed_size for chunk in chunks) for chunks in texts))

    @property
    def num_blocks(self) -> int:
        """Number of row groups."""
        return len(self.sizes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all text, as encoded in the file."""
        return sum(self.sizes)

    def read(self, block: int) -> Iterator[bytes]:
        """The text column of one row group, as JSON lines; damaged pages are a UserError."""
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                texts = file.read_row_group(block, columns=[self.text_key]).column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise packed.unreadable(self.path, error, f"row group {block} cannot be read") from error
        for text in texts:
            yield json.dumps({self.text_key: text or ""}).encode()


@dataclass(frozen=True, kw_only=True)
class Parquet(JsonLines):
    """Parquet: each row is a document. Files with over 16 MB of text in a row group are copied into blocks."""

    def open(self, path: Path) -> CopiedLines | RowGroups:
        """Check the column, and whether the row groups are small enough to be blocks."""
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            raise packed.unreadable(path, error, "not a Parquet file") from error
        rows.check_column(path, self.text_key, schema)
        groups = RowGroups.of(path, self.text_key, metadata)
        if max(groups.sizes, default=0) <= ROW_GROUP_BYTES:
            return groups
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), self.text_key]))

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        """The text column of all row groups, as JSON lines."""
        groups = RowGroups.of(path, self.text_key, pyarrow.parquet.read_metadata(path))
        for group in progress(range(groups.num_blocks), f"copy of {path.name} by row groups", groups.num_blocks):
            yield from groups.read(group)


@dataclass(frozen=True, kw_only=True)
class Csv(JsonLines):
    """CSV or TSV: each row is a document. Quoted text may hold newlines, so files are copied into blocks."""

    def open(self, path: Path) -> CopiedLines:
        """Check the header."""
        FileFormat.open(self, path)
        rows.csv_column(path, self.text_key)
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), self.text_key]))

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        return rows.csv_lines(path, self.text_key)


@dataclass(frozen=True, kw_only=True)
class Arrow(JsonLines):
    """Arrow, as `datasets` saves it: each row is a document. Files are copied into blocks."""

    def open(self, path: Path) -> CopiedLines:
        """Check the column."""
        rows.check_arrow(path, self.text_key)
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), self.text_key]))

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        return rows.arrow_lines(path, self.text_key)


@dataclass(frozen=True, kw_only=True)
class Embedded(JsonLines):
    """The embedded corpus (see `corpus`), extracted once per machine and Python version; `part` is prose or code."""

    part: str

    @cached_property
    def files(self) -> Sequence[CopiedLines]:
        texts = (text for module in corpus.modules() for text in corpus.documents(module, self.part))
        lines = (json.dumps({self.text_key: text}).encode() for text in texts)
        copy = copy_of(self.paths[0], self.cache_dir, self.fingerprint())
        make_copy(copy, lines)
        return [copy]

    def fingerprint(self) -> str:
        return combine([corpus.corpus_sha256(), self.part])
