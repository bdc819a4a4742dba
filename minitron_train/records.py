"""Files that are read back: decoded into a type at one place, or refused in one line.

A record is JSON that this program (or Hugging Face's libraries) wrote earlier. It may have been cut off, edited or
replaced since, so nothing is taken for granted: not that the path is a file, nor its size, nor its encoding, nor the
types of its values. `msgspec` checks them against a dataclass, a TypedDict or a plain annotation.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from minitron_train.errors import UserError, first_line

T = TypeVar("T")
MAX_RECORD_BYTES = 256 * 2**20  # far above what any record holds; a mistaken path must not fill the memory


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """One regular file, opened for reading without waiting for anybody.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a folder, pipe, device or link loop stands in its place, or it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not be waited for
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
            raise UserError(f"{path}: has {size:,} bytes, at most {max_bytes:,} are read; is it the right file?")
        return file.read(max_bytes + 1)


def decode(data: bytes | str, kind: type[T], where: str, remedy: str) -> T:
    """JSON as a value of `kind`; keys that `kind` does not name are ignored.

    Raises:
        UserError: not JSON, nested too deeply, or of other types; the line names the place in the file.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({first_line(error)}); {remedy}") from None


def read_record(path: Path, kind: type[T], remedy: str) -> T:
    """One JSON file as a value of `kind`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, or no file; the line ends with `remedy`.
    """
    return decode(read_bytes(path), kind, str(path), remedy)
