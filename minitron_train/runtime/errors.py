"""The exceptions that a user is meant to see, each as one line."""

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
    """A mistake the user can mend: one line that says what, where, the rule and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class MachineError(RuntimeError):
    """A fault of the machine that ends a run, as a killed process: one line that says what, where and how to resume.

    The command line prints it without a traceback and exits with code 1: nothing has to change before the next start.
    """


def too_many_files(error: Exception) -> MachineError | None:
    """The line for a process that may not open another file or socket; None for any other error.

    Libraries wrap the system's refusal into errors of their own, which keep its words.
    """
    words = os.strerror(errno.EMFILE)
    if getattr(error, "errno", None) != errno.EMFILE and words not in str(error):
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MachineError(f"ulimit -n is {limit}: too many open files; raise it (ulimit -n 4096) and start again")


def first_line(error: Exception) -> str:
    """Of what another library's exception says, for a line of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def error_line(error: Exception, rank: int | None = None) -> str:
    """What the command line prints for a user's mistake: one line without credentials, whatever stands in it.

    Args:
        rank: which process speaks, where there are several.
    """
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in mask_credentials(str(error)))
    return f"error: {line}" if rank is None else f"error: {line} (rank {rank})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" when a known word is close, otherwise nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
