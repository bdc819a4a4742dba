"""Names the rank that the others wait for."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from minitron_train.parallel.groups import Groups
from minitron_train.runtime.console import say


class Stragglers:
    """Every `every_steps` steps, measure how long each rank works before the first collective on gradients.

    The time includes reading data and excludes waiting. Ranks of a tensor-parallel group wait for each other in the forward
    pass, and pipeline stages in both passes, so their times are nearly equal. Other steps, and runs with one rank, are not
    measured and lose no time.

    Args:
        host_of: the host of a rank.
    """

    def __init__(self, groups: Groups, every_steps: int, host_of: Callable[[int], str]) -> None:
        self.groups, self.every_steps, self.host_of = groups, every_steps, host_of
        self.is_measuring, self.step, self.start_s = False, 0, 0.0

    def now(self) -> float:
        """Seconds on this rank's clock, once the device has done all its work."""
        if self.groups.device.type == "cuda":
            torch.cuda.synchronize(self.groups.device)
        return time.perf_counter()

    def begin(self, step: int) -> None:
        """Start the clock, if this step is measured."""
        self.is_measuring = self.groups.world_size > 1 and self.every_steps > 0 and step % self.every_steps == 0
        if self.is_measuring:
            self.step, self.start_s = step, self.now()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Exclude a collective."""
        before_s = self.now() if self.is_measuring else 0.0
        yield
        if self.is_measuring:
            self.start_s += self.now() - before_s

    def end(self) -> None:
        """Gather the times, and print the slowest rank and its share above the median; collective in a measured step."""
        if not self.is_measuring:
            return
        own_s = self.now() - self.start_s
        seconds = torch.zeros(self.groups.world_size, dtype=torch.float64, device=self.groups.device)
        seconds[self.groups.rank] = own_s
        times = self.groups.sum(seconds).tolist()
        slowest, median_s = times.index(max(times)), sorted(times)[(len(times) - 1) // 2]
        if self.groups.is_first:
            share = f"{max(times) / median_s - 1:.0%} above the median {median_s:.3g} s"
            say(f"step {self.step}: slowest rank {slowest} on {self.host_of(slowest)}: {max(times):.3g} s, {share}")
