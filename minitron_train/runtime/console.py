"""Console output: rank 0 prints for all ranks; progress bars on a terminal, plain lines elsewhere.

Everything goes through the logger `minitron_train`, so that a notebook can silence or redirect it:
logging.getLogger("minitron_train").setLevel("WARNING").
"""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from minitron_train.runtime.launch import read_world

T = TypeVar("T")

PLAIN_INTERVAL_S = 10.0


class LineHandler(logging.Handler):
    """Prints each line immediately, above a progress bar if one is shown: warnings on stderr, the rest on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        if stream.isatty():
            from tqdm import tqdm

            tqdm.write(self.format(record), file=stream)
        else:
            print(self.format(record), file=stream, flush=True)


def make_logger() -> logging.Logger:
    """The program's logger, with a handler of its own; its lines do not propagate to the root logger."""
    made = logging.getLogger("minitron_train")
    made.setLevel(logging.INFO)
    made.propagate = False
    made.addHandler(LineHandler())
    return made


LOGGER = make_logger()


def say(line: str) -> None:
    """Log one line, on rank 0 only."""
    if read_world().is_first:
        LOGGER.info("%s", line)


def warn(line: str) -> None:
    """Log one warning, on rank 0 only; it does not mix with what a command prints for other programs (--cfg job)."""
    if read_world().is_first:
        LOGGER.warning("warning: %s", line)


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield `items`. Rank 0 shows a bar on a terminal, or a plain line every PLAIN_INTERVAL_S.

    Only the main thread shows anything: bars of several threads would overwrite each other.
    """
    is_shown = threading.current_thread() is threading.main_thread() and LOGGER.isEnabledFor(logging.INFO)
    if not (is_shown and read_world().is_first):
        yield from items
    elif sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label, total=total, leave=False)
    else:
        start_s = last_s = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now_s = time.monotonic()
            if now_s - last_s > PLAIN_INTERVAL_S and done < total:
                last_s = now_s
                left_s = (now_s - start_s) / done * (total - done)
                say(f"{label}: {done}/{total}, about {left_s:.0f} s left")
