"""A progress bar for a whole evaluation. Its total grows as lm-eval sends more requests."""

import sys
import time

from tqdm import tqdm

from minitron_train.runtime.console import PLAIN_INTERVAL_S, say


class RequestBar:
    """Shows progress on rank 0: a bar on a terminal, otherwise at most one line every PLAIN_INTERVAL_S seconds."""

    def __init__(self, is_first: bool) -> None:
        self.plain = is_first and not sys.stderr.isatty()
        self.bar = tqdm(desc="evaluate", total=0, unit="request", leave=False, disable=not is_first or self.plain)
        self.done = self.total = 0
        self.start_s = self.last_s = time.monotonic()

    def expect(self, count: int) -> None:
        """Add `count` requests to the total."""
        self.total += count
        self.bar.total = self.total
        self.bar.refresh()

    def advance(self, count: int) -> None:
        """Count `count` more answered requests."""
        count = min(count, self.total - self.done)
        self.done += count
        self.bar.update(count)
        now_s = time.monotonic()
        if self.plain and now_s - self.last_s > PLAIN_INTERVAL_S:
            self.last_s = now_s
            say(f"evaluate: {self.done} of {self.total} requests, {now_s - self.start_s:.0f} s")

    def close(self) -> None:
        self.bar.close()
