"""A hook that profiles some steps with torch.profiler and writes a trace for chrome://tracing or ui.perfetto.dev."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from minitron_train.runtime.console import say
from minitron_train.train.hooks import Hook
from minitron_train.train.metrics import Metrics

if TYPE_CHECKING:
    from minitron_train.train.loop import Trainer


class ProfileSteps(Hook):
    """Profile rank 0 from step `first` to step `last`. The first step of a start is never profiled: it warms up.

    Args:
        folder: where the trace is written, as trace_steps_FIRST_LAST.json.gz.
    """

    reads_weights = False

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self.first, self.last, self.folder = first, last, folder
        self.profiler: profile | None = None
        self.begun_at = 0

    def after_step(self, training: "Trainer", row: Metrics) -> Metrics:
        """Start before the first step to profile, and write the trace after the last one."""
        step = training.state.step
        if self.profiler is not None and (step >= self.last or step >= training.num_steps):
            self.write(step)
        elif self.profiler is None and self.first <= step + 1 <= self.last and training.groups.is_first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler, self.begun_at = profile(activities=activities, record_shapes=True), step + 1
            self.profiler.start()
        return {}

    def write(self, step: int) -> None:
        """End the profile with `step`."""
        assert self.profiler is not None
        self.profiler.stop()
        file = self.folder / f"trace_steps_{self.begun_at}_{step}.json.gz"
        self.profiler.export_chrome_trace(str(file))
        self.profiler = None
        say(f"profile: {file}; open it at ui.perfetto.dev")
