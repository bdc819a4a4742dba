"""Text sources as blocks: every format has `num_blocks`, `block_bytes`, `read(block)` -> documents, `fingerprint`.

A block is a small deterministic part of the source (about 32 kB of lines, a row group, a few modules) that can be read
without the blocks before it. So shuffling and resuming work on block numbers. All classes can be pickled: the
tokenising processes read their blocks themselves.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from minitron_train.data import corpus, identity, packed, rows
from minitron_train.data.columns import Columns, TextColumn
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
    columns: Columns = TextColumn("text")
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
    """JSON Lines, or files of one JSON array: each object is a row."""

    def open(self, path: Path) -> "PlainLines | CopiedLines | RowGroups":
        """A file of one JSON array is copied into blocks: it may be a single line."""
        file = super().open(path)
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), "array"])) if is_array(path) else file

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        return rows.array_lines(path) if is_array(path) else super().lines_to_copy(path)

    def read(self, block: int) -> Iterator[Sequence[str]]:
        yield from ([text] for _, text in self.numbered(block))

    def numbered(self, block: int) -> Iterator[tuple[int, str]]:
        """The block's documents, each with the number of its line in the block."""
        file, inner = self.locate(block)
        for number, line in enumerate(self.files[file].read(inner)):
            if line.strip():
                try:
                    text = self.columns.document(object_of(line))
                except ValueError as error:
                    raise UserError(f"{self.place(file, inner, number)}: {error}") from error
                yield number, text

    def place_of(self, document: str, blocks: Iterable[int]) -> str | None:
        """File and line of a document, for a message; None if it is not in these blocks."""
        for block in blocks:
            for number, text in self.numbered(block):
                if text == document:
                    return self.place(*self.locate(block), number)
        return None

    def fingerprint(self) -> str:
        return combine([super().fingerprint(), self.columns.identity])

    def place(self, file: int, block: int, number: int) -> str:
        """File and line for a message; the block instead of the line where counting would take minutes."""
        path, reader = self.paths[file], self.files[file]
        if block * BLOCK_BYTES > COUNTED_BYTES:
            return f"{path}, block {block:,} of {reader.num_blocks:,}"
        return f"{path}, line {sum(len(list(reader.read(i))) for i in range(block)) + number + 1:,}"


def is_array(path: Path) -> bool:
    """Whether a file begins like a JSON array."""
    return packed.head(path).removeprefix(BOM).lstrip().startswith(b"[")


def object_of(line: bytes) -> dict[str, Any]:
    """One JSON object.

    Raises:
        ValueError: the line is none; the caller adds the file to the message.
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
    return row


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
    columns: Columns
    names: tuple[str, ...]  # of the columns to read
    sizes: tuple[int, ...]  # bytes of these columns in each group

    @classmethod
    def of(cls, path: Path, columns: Columns, file: pyarrow.parquet.ParquetFile) -> "RowGroups":
        """The row groups of an opened file, whose columns were checked."""
        names = tuple(columns.of(file.schema_arrow.names))
        parts = tuple(f"{name}." for name in names)  # the leaves of a nested column
        sizes = []
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            chunks = [group.column(i) for i in range(group.num_columns)]
            read = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(parts)]
            sizes.append(sum(chunk.total_uncompressed_size for chunk in read))
        return cls(path, columns, names, tuple(sizes))

    @property
    def num_blocks(self) -> int:
        """Number of row groups."""
        return len(self.sizes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all text, as encoded in the file."""
        return sum(self.sizes)

    def read(self, block: int) -> Iterator[bytes]:
        """The rows of one row group, as JSON lines; damaged pages are a UserError."""
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                found = file.read_row_group(block, columns=list(self.names)).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise packed.unreadable(self.path, error, f"row group {block} cannot be read") from error
        for row in found:
            yield self.columns.line(row)


@dataclass(frozen=True, kw_only=True)
class Parquet(JsonLines):
    """Parquet: each row is a document. Files with over 16 MB of text in a row group are copied into blocks."""

    def open(self, path: Path) -> CopiedLines | RowGroups:
        """Check the column, and whether the row groups are small enough to be blocks."""
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self.columns.check(path, file.schema_arrow)
                groups = RowGroups.of(path, self.columns, file)
        except (pyarrow.ArrowException, OSError) as error:
            raise packed.unreadable(path, error, "not a Parquet file") from error
        if max(groups.sizes, default=0) <= ROW_GROUP_BYTES:
            return groups
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), self.columns.identity]))

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        """The rows of all row groups, as JSON lines."""
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = RowGroups.of(path, self.columns, file)
        for group in progress(range(groups.num_blocks), f"copy of {path.name} by row groups", groups.num_blocks):
            yield from groups.read(group)


@dataclass(frozen=True, kw_only=True)
class Csv(JsonLines):
    """CSV or TSV: each row is a document. Quoted text may hold newlines, so files are copied into blocks."""

    def open(self, path: Path) -> CopiedLines:
        """Check the header."""
        FileFormat.open(self, path)
        rows.csv_column(path, self.columns.identity)
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), self.columns.identity]))

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        return rows.csv_lines(path, self.columns.identity)


@dataclass(frozen=True, kw_only=True)
class Arrow(JsonLines):
    """Arrow, as `datasets` saves it: each row is a document. Files are copied into blocks."""

    def open(self, path: Path) -> CopiedLines:
        """Check the column."""
        self.columns.check(path, rows.arrow_schema(path))
        return copy_of(path, self.cache_dir, combine([sample_sha256(path), self.columns.identity]))

    def lines_to_copy(self, path: Path) -> Iterator[bytes]:
        yield from map(self.columns.line, rows.arrow_rows(path, self.columns.of))


@dataclass(frozen=True, kw_only=True)
class Embedded(JsonLines):
    """The embedded corpus (see `corpus`), extracted once per machine and Python version; `part` is prose or code."""

    part: str

    @cached_property
    def files(self) -> Sequence[CopiedLines]:
        texts = (text for module in corpus.modules() for text in corpus.documents(module, self.part))
        lines = (self.columns.line({self.columns.identity: text}) for text in texts)
        copy = copy_of(self.paths[0], self.cache_dir, self.fingerprint())
        make_copy(copy, lines)
        return [copy]

    def fingerprint(self) -> str:
        return combine([corpus.corpus_sha256(), self.part])
