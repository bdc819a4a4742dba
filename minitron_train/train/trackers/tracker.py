"""The interface of a tracker: what training tells it, and what it must know to continue its run after a restart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minitron_train.config import TrackingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a tracker gets at each start of a training. `config` holds JSON values with masked credentials."""

    folder: Path
    name: str
    step: int  # metrics.jsonl is complete up to this step; later steps are trained now, some of them again
    run_id: str | None  # what `Tracker.run_id` was at the last start
    config: Mapping[str, Any]

    @property
    def metrics_file(self) -> Path:
        """metrics.jsonl. Its lines are written before the tracker is told of them."""
        return self.folder / "metrics.jsonl"


class Tracker:
    """One run in one tracker. Only rank 0 has trackers.

    Any method may raise any error: the caller reports it, goes on without the tracker, and calls `abandon`. A method must
    not wait for a server longer than some seconds.
    """

    label: ClassVar[str]
    run_id: str | None = None  # with it, the next start continues this run
    place: str | None = None  # where a person finds the run: an address, a folder or a file

    def __init__(self, settings: TrackingConfig, training: Training) -> None:
        """Begin a run, or continue the one of `training.run_id`."""

    @classmethod
    def packages(cls, settings: TrackingConfig) -> Mapping[str, str]:
        """The modules that the tracker imports and the program does not depend on -> their names for pip."""
        return {}

    @classmethod
    def is_off(cls, settings: TrackingConfig) -> bool:
        """Whether a setting or variable of the tracker's own switches it off."""
        return False

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the metrics of one step: `step`, and values that are numbers or None."""
        raise NotImplementedError

    def record(self, kind: str, folder: Path, *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        """Log one stage's folder.

        Args:
            consumed: the run has read the folder; otherwise it has written it.
        """

    def close(self, *, failed: bool) -> None:
        """Send pending data and finish the run."""

    def abandon(self) -> None:
        """Clean up after an error, so that the exit of the process does not fail again."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values of a row that are numbers, without its step."""
    return {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
