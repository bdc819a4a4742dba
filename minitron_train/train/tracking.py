"""The trackers of a training: opened by rank 0, continued by a restart, and dropped after an error."""

import contextlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from minitron_train.config import TrackerKind, TrackingConfig
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import atomic_write_json
from minitron_train.runtime.masking import mask_credentials
from minitron_train.runtime.records import read_record, set_aside
from minitron_train.train.trackers.mlflow_tracker import MlflowTracker
from minitron_train.train.trackers.tensorboard_tracker import TensorBoardTracker
from minitron_train.train.trackers.tracker import Tracker, Training
from minitron_train.train.trackers.wandb_tracker import WandbTracker

FILE = "trackers.json"  # in the training's folder: the run of each tracker
TRACKERS: dict[TrackerKind, type[Tracker]] = {
    TrackerKind.wandb: WandbTracker,
    TrackerKind.tensorboard: TensorBoardTracker,
    TrackerKind.mlflow: MlflowTracker,
}


class TrackedRun(TypedDict):
    """The run of one tracker: how the next start finds it, and where a person does."""

    run_id: str | None
    place: str | None


def configured(settings: TrackingConfig) -> list[TrackerKind]:
    """The trackers in tracking.trackers that are not switched off."""
    return [kind for kind in settings.trackers if not TRACKERS[kind].is_off(settings)]


def check_packages(settings: TrackingConfig) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        UserError: gives the command that installs them.
    """
    for kind in configured(settings):
        packages = TRACKERS[kind].packages(settings)
        lacking = [module for module in packages if importlib.util.find_spec(module) is None]
        if lacking:
            raise UserError(
                f"tracking.trackers: {kind} needs {', '.join(lacking)}, not installed here; run "
                f"pip install {' '.join(packages[module] for module in lacking)}, or leave {kind} out"
            )


def read_runs(folder: Path) -> dict[str, TrackedRun]:
    """The runs in trackers.json, by tracker; empty without the file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_record(folder / FILE, dict[str, TrackedRun], "delete it, and the trackers begin new runs")
    except FileNotFoundError:
        return {}


def places(folder: Path) -> dict[str, str]:
    """Where a person finds the runs of a training, by the name of the tracker; raises what `read_runs` does."""
    labels = {kind.value: tracker.label for kind, tracker in TRACKERS.items()}
    return {labels.get(kind, kind): run["place"] for kind, run in read_runs(folder).items() if run["place"]}


@dataclass(slots=True)
class Guarded:
    """A tracker that cannot stop training: after an error it is reported once, and left out until the next start."""

    tracker: Tracker | None

    def send(self, action: Callable[[Tracker], object]) -> None:
        """Run `action`. A scheduler's SIGTERM, for example, also ends W&B's process, so that any call may fail."""
        if self.tracker is None:
            return
        try:
            action(self.tracker)
        except Exception as error:  # no tracker's error may stop training; metrics.jsonl has all metrics
            say(
                f"{self.tracker.label} failed ({first_line(error)}); metrics.jsonl continues, and the next start "
                f"resumes the {self.tracker.label} run"
            )
            failed, self.tracker = self.tracker, None
            with contextlib.suppress(Exception):
                failed.abandon()


@dataclass(frozen=True, slots=True)
class Trackers:
    """All trackers of a training, as one sink of metrics."""

    guarded: tuple[Guarded, ...] = ()

    @classmethod
    def open(cls, settings: TrackingConfig, training: Training, *, former_wandb_id: str | None = None) -> "Trackers":
        """Begin or continue a run in each configured tracker, and record the runs in trackers.json.

        Args:
            training: `run_id` is not used.
            former_wandb_id: the W&B run of a checkpoint from before trackers.json.
        """
        runs = known_runs(training.folder)
        if former_wandb_id is not None:
            runs.setdefault(TrackerKind.wandb, TrackedRun(run_id=former_wandb_id, place=None))
        opened = []
        for kind in configured(settings):
            known = runs.get(kind)
            tracker = begin(TRACKERS[kind], settings, replace(training, run_id=known and known["run_id"]))
            if tracker is not None:
                place = tracker.place and mask_credentials(tracker.place)
                runs[kind] = TrackedRun(run_id=tracker.run_id, place=place)
                opened.append(Guarded(tracker))
        if runs:
            atomic_write_json(training.folder / FILE, runs)
        return cls(tuple(opened))

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the metrics of one step."""
        for one in self.guarded:
            one.send(lambda tracker: tracker.write(row))

    def record(self, folders: Mapping[str, Path], *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        """Log folders, by kind, that the training has read (`consumed`) or written."""
        for one in self.guarded:
            for kind, folder in folders.items():
                one.send(lambda tracker, at=(kind, folder): tracker.record(*at, consumed=consumed, facts=facts))

    def close(self, *, failed: bool = False) -> None:
        """Send pending data and finish all runs."""
        for one in self.guarded:
            one.send(lambda tracker: tracker.close(failed=failed))
            one.tracker = None


def begin(kind: type[Tracker], settings: TrackingConfig, training: Training) -> Tracker | None:
    """Open one tracker; None, with a line, if it fails: training continues without a key or a network."""
    try:
        return kind(settings, training)
    except Exception as error:
        say(
            f"{kind.label} could not start ({first_line(error)}); metrics.jsonl has all metrics, and the next start tries "
            "again"
        )
        return None


def known_runs(folder: Path) -> dict[str, TrackedRun]:
    """The same as `read_runs`; a damaged file is renamed, and all trackers begin new runs."""
    try:
        return read_runs(folder)
    except UserError as error:
        say(f"{error}; kept as {set_aside(folder / FILE).name}")
        return {}
