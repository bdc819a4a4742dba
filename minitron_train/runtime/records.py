"""Read JSON and YAML records as typed values, or reject them in one line.

A record is JSON that this program (or a Hugging Face library) wrote earlier. It may have been cut off, edited or
replaced since. So everything is checked: that the path is a file, its size, its encoding, and the types of its values
(by `msgspec`, against a dataclass, a TypedDict or an annotation).

A damaged record of finished work is an error with a remedy. A damaged by-product (metrics, answers of an unfinished
evaluation) is renamed, and the work continues.
"""

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Generic, TypeVar, cast

import msgspec
import yaml
from msgspec import Meta

from minitron_train.runtime.errors import UserError, first_line

T = TypeVar("T")
MAX_RECORD_BYTES = 256 * 2**20  # far above any record; a wrong path must not fill the memory
MAX_LINES_BYTES = 8 * 2**30  # an evaluation writes a line per row, a training one per step
MAX_DEPTH = 100  # nested brackets; our records have ten, Python's recursion limit is 1,000
STRING = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?', re.DOTALL)  # a JSON string, terminated or not
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]  # float() and numpy take any such number
Real = Annotated[float, Meta(ge=-1e150, le=1e150)]  # its square is finite
Seconds = Annotated[float, Meta(ge=0, le=1e12)]


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open one regular file for reading, without blocking.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is a folder, pipe, device or link loop, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not block
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{path}: is not a regular file; remove it")
        with os.fdopen(handle, "rb") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def read_bytes(path: Path, *, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """The bytes of one regular file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: see `open_file`; or the file is too large.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(
                f"{path}: has {size:,} bytes, at most {max_bytes:,} are read; check that it is the right file"
            )
        return file.read(max_bytes + 1)


def decode(data: bytes | str, kind: type[T], where: str, remedy: str) -> T:
    """Decode JSON into a value of `kind`; keys that `kind` does not name are ignored.

    Raises:
        UserError: not JSON, nested too deeply, or of other types; the message names the place in the file.
    """
    try:
        text = data if isinstance(data, str) else data.decode()  # msgspec does not check the encoding of what it skips
        check_depth(text.encode())
        return msgspec.json.decode(text, type=kind)
    except DECODE_ERRORS as error:
        raise damaged(where, first_line(error), remedy) from None


def damaged(where: str, why: str, remedy: str) -> UserError:
    """The error for a damaged record."""
    return UserError(f"{where}: damaged ({why}); {remedy}")


def check_depth(data: bytes) -> None:
    """Refuse JSON that is nested deeper than MAX_DEPTH: recursive code would fail on it.

    Raises:
        RecursionError: the nesting is deeper.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    import numpy as np  # here, because --help imports this module and needs no numpy

    brackets = np.frombuffer(STRING.sub(b"", data).translate(None, NO_BRACKETS), np.uint8)
    opens = (brackets == ord("[")) | (brackets == ord("{"))
    if np.where(opens, 1, -1).cumsum().max(initial=0) > MAX_DEPTH:
        raise RecursionError(f"nested deeper than {MAX_DEPTH} levels")


def read_record(path: Path, kind: type[T], remedy: str) -> T:
    """Read one JSON file as a value of `kind`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or not a regular file; the message ends with `remedy`.
    """
    return decode(read_bytes(path), kind, str(path), remedy)


def read_whole_record(path: Path, kind: type[T], remedy: str) -> T:
    """Read one JSON object that fits the TypedDict `kind`; keys that `kind` does not name are kept.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or not a regular file; the message ends with `remedy`.
    """
    data = read_bytes(path)
    decode(data, kind, str(path), remedy)
    return cast(T, decode(data, dict[str, Any], str(path), remedy))


@dataclass(frozen=True, slots=True)
class Lines(Generic[T]):
    """The lines of a .jsonl file.

    Attributes:
        values: the lines that could be decoded.
        damaged: what is wrong with every other line, by line number from 1.
        cut_off: whether the last line lacks its newline and cannot be decoded, as after a kill during the write.
    """

    values: list[T]
    damaged: dict[int, str]
    cut_off: bool


def read_lines(path: Path, decoder: Callable[[bytes], T]) -> Lines[T]:
    """Read a .jsonl file; blank lines are skipped.

    Args:
        decoder: returns the value of one line, or raises one of DECODE_ERRORS.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a regular file, or cannot be read.
    """
    values: list[T] = []
    wrong: dict[int, str] = {}
    *lines, last = read_bytes(path, max_bytes=MAX_LINES_BYTES).split(b"\n")
    for number, line in enumerate([*lines, last], start=1):
        try:
            if line.strip():
                values.append(decoder(line))
        except DECODE_ERRORS as error:
            wrong[number] = first_line(error)
    cut_off = wrong.pop(len(lines) + 1, None) is not None
    return Lines(values, wrong, cut_off)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, or whatever has its name, to NAME.damaged-N. Returns the new path.

    Raises:
        OSError: the folder cannot be written.
    """
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    target = next(name for name in names if not os.path.lexists(name))
    path.rename(target)
    return target


def decode_yaml(text: str, where: str, remedy: str) -> Any:
    """Decode YAML into plain Python values; tags that create other objects are refused.

    Raises:
        UserError: not YAML, with such a tag, or nested too deeply.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date like 2026-99-99
        raise damaged(where, joined(error), remedy) from None


def joined(error: Exception, max_length: int = 200) -> str:
    """An exception's text on one line of at most `max_length` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_length else f"{text[:max_length]}…"
