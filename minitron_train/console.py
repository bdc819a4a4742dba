"""What the user sees: one voice for all ranks, bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from minitron_train.parallel.launch import read_world

T = TypeVar("T")

PLAIN_INTERVAL_S = 10.0


def say(line: str) -> None:
    """Print one line, on rank 0 only, at once, without tearing a progress bar."""
    if not read_world().is_first:
        return
    if sys.stdout.isatty():
        from tqdm import tqdm

        tqdm.write(line)
    else:
        print(line, flush=True)


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Go through `items` with a bar on a terminal, or a plain line every ten seconds; only rank 0 shows it."""
    if not read_world().is_first:
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
