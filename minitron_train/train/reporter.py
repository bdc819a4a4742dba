"""The reporter: sends a run's metrics from rank 0 to metrics.jsonl, the trackers and the console."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_train.parallel.groups import Groups
from minitron_train.train.metrics import Console, Metrics, MetricsFile, ThroughputMeter, peak_memory_bytes
from minitron_train.train.tracking import Trackers


class Reporter:
    """Writes metrics every `every_steps` steps and after each evaluation. Ranks other than 0 only measure throughput."""

    def __init__(
        self,
        groups: Groups,
        speed: ThroughputMeter,
        every_steps: int,
        sinks: tuple[MetricsFile | Trackers | Console, ...] = (),
        trackers: Trackers | None = None,
    ) -> None:
        self.groups, self.speed, self.every_steps, self.sinks, self.trackers = (
            groups,
            speed,
            every_steps,
            sinks,
            trackers,
        )
        self.data_seconds = 0.0  # since the last line

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of a block as waiting for the stream."""
        start_s = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - start_s

    def resume_clock(self) -> None:
        """Restart the throughput clock, so that time before this call does not count as training."""
        self.speed.resume()

    def count(self, tokens: int) -> None:
        self.speed.count(tokens)

    def report(self, step: int, row: Metrics) -> None:
        """Write the metrics of one step if they are due."""
        evaluated = any(key.startswith("eval.") for key in row)
        if step % self.every_steps and not evaluated:
            return
        line = {"step": step, **row, **self.speed.read(), "data_seconds": self.data_seconds}
        line["peak_memory_bytes"] = peak_memory_bytes(self.groups.device)
        self.data_seconds = 0.0
        for sink in self.sinks:
            sink.write(line)

    def record(self, folders: Mapping[str, Path], *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        """Tell the trackers which folders, by kind, the training has read (`consumed`) or written."""
        if self.trackers is not None:
            self.trackers.record(folders, consumed=consumed, facts=facts)

    def close(self, *, failed: bool) -> None:
        """Close all sinks, without collectives."""
        for sink in self.sinks:
            sink.close(failed=failed)
