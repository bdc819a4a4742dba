"""Rows of CSV, Arrow and JSON arrays as JSON lines. Such files have no random access, so copies are written from these."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
import pyarrow.ipc

from minitron_train.data import packed
from minitron_train.data.lines import decompressed_lines
from minitron_train.data.recognise import BOM
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.records import decode

DELIMITERS = (",", "\t", ";", "|")  # the first one with which the header has the column
MAX_FIELD_BYTES = 2**31 - 1  # csv's default limit of 128 kB is shorter than a long document
MAX_SHOWN = 400  # characters of column names in a message
MAX_HEADER_LINES = 100  # a CSV header may have newlines in quoted column names
MAX_ARRAY_BYTES = 2**32  # a JSON array is parsed in memory


def array_lines(path: Path) -> Iterator[bytes]:
    """The members of a JSON array, each on one line.

    Raises:
        UserError: the file is damaged, or too large to be parsed at once.
    """
    remedy = "write it as JSON Lines (jq -c '.[]')"
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise UserError(f"{path}: one JSON array of over 4 GiB, which is parsed in memory; {remedy}")
    whole = b"\n".join(decompressed_lines(path)).removeprefix(BOM)
    for member in decode(whole, list[msgspec.Raw], str(path), remedy):
        yield bytes(member).replace(b"\n", b" ")  # strings hold no newline in JSON


def csv_lines(path: Path, text_key: str) -> Iterator[bytes]:
    """The texts of a CSV or TSV file (RFC 4180: quotes may hold newlines), each as one JSON object.

    Raises:
        UserError: the file is not UTF-8, has no such column, or a row has more or fewer fields than the header.
    """
    csv.field_size_limit(MAX_FIELD_BYTES)
    column, header, delimiter = csv_column(path, text_key)
    rows = csv.reader(text_lines(path), delimiter=delimiter, strict=True)
    try:
        next(rows)
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{path}, line {rows.line_num}: {len(row)} fields, but the header has {len(header)}; "
                    "put quotes around fields that hold the delimiter"
                )
            if row:
                yield json.dumps({text_key: row[column]}).encode()
    except csv.Error as error:
        raise not_csv(path, rows.line_num, error) from error


def csv_column(path: Path, text_key: str) -> tuple[int, list[str], str]:
    """The text's column, the header and the delimiter of a CSV file.

    Raises:
        UserError: no delimiter gives a header with `text_key`.
    """
    csv.field_size_limit(MAX_FIELD_BYTES)
    first = list(islice(text_lines(path), MAX_HEADER_LINES))
    try:
        headers = {delimiter: next(csv.reader(first, delimiter=delimiter), []) for delimiter in DELIMITERS}
    except csv.Error as error:
        raise not_csv(path, 1, error) from error
    for delimiter, header in headers.items():
        if text_key in header:
            check_once(path, text_key, header)
            return header.index(text_key), header, delimiter
    raise UserError(f"{path}: {no_column(text_key, ', '.join(max(headers.values(), key=len)))}")


def not_csv(path: Path, line: int, error: csv.Error) -> UserError:
    """The error for a file that the csv module refuses."""
    if "new-line character" in str(error):
        return UserError(f"{path}, line {line}: has carriage returns alone; end lines with a newline (mac2unix)")
    return UserError(f"{path}, line {line}: not CSV ({error}); double the quotes inside of a quoted field")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without its byte order mark, each with its newline.

    Raises:
        UserError: a line is not UTF-8.
    """
    for number, line in enumerate(decompressed_lines(path), 1):
        try:
            yield (line.removeprefix(BOM) if number == 1 else line).decode() + "\n"
        except UnicodeDecodeError as error:
            raise not_utf8(f"{path}, line {number}", error) from error


def arrow_rows(path: Path, columns: Callable[[Sequence[str]], list[str]]) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file (stream or file format). Damaged batches raise a UserError.

    Args:
        columns: returns the columns to read among all.
    """
    try:
        with pyarrow.memory_map(str(path)) as file:
            for batch in arrow_batches(file):
                batch.validate(full=True)  # damaged offsets would point outside of the file
                yield from batch.select(columns(batch.schema.names)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise packed.unreadable(path, error, "not a whole Arrow file") from error


def arrow_batches(file: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    """The record batches of an opened Arrow file."""
    reader = open_arrow(file)
    if isinstance(reader, pyarrow.RecordBatchFileReader):
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from reader


def open_arrow(file: pyarrow.NativeFile) -> pyarrow.RecordBatchFileReader | pyarrow.RecordBatchStreamReader:
    """A reader of either of Arrow's formats: `datasets` writes streams, Feather is the file format."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)


def arrow_schema(path: Path) -> pyarrow.Schema:
    """The columns of an Arrow file; a UserError if it is none."""
    try:
        with pyarrow.memory_map(str(path)) as file:
            return open_arrow(file).schema
    except (pyarrow.ArrowException, OSError) as error:
        raise packed.unreadable(path, error, "not an Arrow file") from error


def check_once(path: Path, text_key: str, columns: Sequence[str]) -> None:
    """Refuse a table with several columns of that name."""
    if (count := columns.count(text_key)) > 1:
        raise UserError(f"{path}: {count} columns are called {text_key}; rename all but one")


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type gives strings (or nothing but nulls)."""
    if isinstance(kind, pyarrow.DictionaryType):
        return is_text(kind.value_type)
    checks = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_string_view,
        pyarrow.types.is_null,
    )
    return any(check(kind) for check in checks)


def no_column(text_key: str, columns: str) -> str:
    """The message about a wrong text_key, with the columns of the table."""
    return f"no column {text_key}: it has {shortened(columns) or 'none'}; set text_key"


def shortened(columns: str) -> str:
    """Column names, cut to a readable length."""
    return columns if len(columns) <= MAX_SHOWN else columns[:MAX_SHOWN] + " …"


def not_utf8(where: Path | str, error: UnicodeDecodeError) -> UserError:
    """The error for bytes that are not UTF-8; it shows them."""
    what = error.object[error.start : error.start + 8]
    return UserError(
        f"{where}: not UTF-8 near {what!r}; convert the file (iconv -f windows-1252 -t utf-8, or its encoding)"
    )
