"""TensorBoard: event files in the training's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_train.config import TrackingConfig
from minitron_train.train.trackers.tracker import Tracker, Training, numbers

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Event files in FOLDER. Each start writes its own file, which tells readers to drop the steps that it trains again."""

    label = "TensorBoard"

    def __init__(self, settings: TrackingConfig, training: Training) -> None:
        from torch.utils.tensorboard import SummaryWriter

        from minitron_train.train.metrics import read_rows

        folder = training.folder / FOLDER
        is_new = not any(folder.glob("events.*"))
        self.place = str(folder)
        self.writer = SummaryWriter(str(folder), purge_step=training.step + 1)
        self._text("config", training.config, training.step + 1)
        if is_new:  # the tracker may have been added to a training that had begun without it
            for row in read_rows(training.metrics_file).values:
                self._add(row)
        self.writer.flush()
        self.step = training.step

    @classmethod
    def packages(cls, settings: TrackingConfig) -> Mapping[str, str]:
        return {"tensorboard": "tensorboard"}

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the row and flush it: a checkpoint must not outlive the metrics of its steps."""
        self.step = row["step"]
        self._add(row)
        self.writer.flush()

    def record(self, kind: str, folder: Path, *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        told = {"folder": str(folder.resolve()), **({"facts": facts} if facts else {})}
        self._text(f"{'input' if consumed else 'output'}/{kind}", told, self.step)

    def close(self, *, failed: bool) -> None:
        self.writer.close()

    def _add(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def _text(self, name: str, values: Mapping[str, Any], step: int) -> None:
        indented = json.dumps(values, indent=2, ensure_ascii=False, default=str).replace("\n", "\n    ")
        self.writer.add_text(name, f"    {indented}", step)  # markdown's code block
