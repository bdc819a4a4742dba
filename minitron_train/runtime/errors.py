"""Exceptions that the command line prints as one line, without a traceback."""

import difflib
import errno
import os
import resource
from collections.abc import Iterable

from minitron_train.runtime.masking import mask_credentials

PATH_MISTAKES = {  # errno -> the rule and the remedy, for paths that the user gave
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter one",
    errno.ELOOP: "its links form a circle; remove them, or give the path that is meant",
}


class UserError(ValueError):
    """A mistake that the user can fix. Its one line says what happened, where, the rule and the remedy.

    The command line exits with code 2.
    """


class MachineError(RuntimeError):
    """A fault of the machine that ends a run, such as a killed process. Its one line says what, where and how to resume.

    The command line exits with code 1: the same command may be started again unchanged.
    """


def too_many_files(error: Exception) -> MachineError | None:
    """A MachineError if `error` means that this process has reached its limit of open files; otherwise None.

    Libraries wrap the system's error in classes of their own but keep its text.
    """
    words = os.strerror(errno.EMFILE)
    if getattr(error, "errno", None) != errno.EMFILE and words not in str(error):
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MachineError(f"ulimit -n is {limit}: too many open files; raise it (ulimit -n 4096) and start again")


def first_line(error: Exception) -> str:
    """First line of an exception's text; the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def error_line(error: Exception, rank: int | None = None) -> str:
    """The line that the command line prints for an error: credentials masked, control characters escaped.

    Args:
        rank: the rank of this process, if there are several.
    """
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in mask_credentials(str(error)))
    return f"error: {line}" if rank is None else f"error: {line} (rank {rank})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" when a known word is close, otherwise nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
