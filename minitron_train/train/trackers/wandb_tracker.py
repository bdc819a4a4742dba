"""Weights & Biases: the metrics of metrics.jsonl, one run across restarts, and the model's lineage as artifacts."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.config import TrackingConfig, WandbConfig, WandbMode
from minitron_train.runtime.console import say
from minitron_train.stages import read_provenance, read_started_record
from minitron_train.train.trackers.tracker import Tracker, Training

KNOWN = ("stage", "command", "settings", "inputs", "parent", "facts", "git_commit")  # provenance fields in an artifact
MAX_NAME_CHARACTERS = 128  # W&B's limit for the name of an artifact
YES = ("1", "true", "t", "yes", "y", "on")
MODES = {  # WANDB_MODE, including older names -> mode of one run
    **{"online": "online", "offline": "offline", "disabled": "disabled"},
    **{"run": "online", "dryrun": "offline", "shared": "online"},
}


def wandb_mode(mode: WandbMode) -> str:
    """Return online, offline or disabled. `auto` follows the environment, then uses online if an API key is set."""
    if mode is not WandbMode.auto:
        return mode.value
    if os.environ.get("WANDB_DISABLED", "").lower() in YES:
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in MODES:
        return MODES[asked]
    if asked:
        say(f"WANDB_MODE={asked}: must be one of {', '.join(MODES)}; using offline")
        return "offline"
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


@dataclass(frozen=True, slots=True)
class Place:
    """The name of a run, its project on the server, and its local folder."""

    project: str
    entity: str | None
    name: str
    folder: Path


def run_place(settings: WandbConfig, folder: Path, name: str) -> Place:
    """Take each value from the configuration, else from the environment, else from the defaults."""
    environ = os.environ
    return Place(
        project=settings.project or environ.get("WANDB_PROJECT") or "minitron_train",
        entity=settings.entity or environ.get("WANDB_ENTITY") or None,
        name=settings.name or environ.get("WANDB_NAME") or name,
        folder=Path(environ.get("WANDB_DIR") or folder),
    )


class WandbTracker(Tracker):
    """One W&B run. A process of W&B's own sends the data."""

    label = "W&B"

    def __init__(self, settings: TrackingConfig, training: Training) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        place = run_place(settings.wandb, training.folder, training.name)
        (place.folder / "wandb").mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(
            project=place.project,
            entity=place.entity,
            name=place.name,
            dir=str(place.folder),
            id=training.run_id,
            resume="allow",
            mode=wandb_mode(settings.wandb.mode),  # type: ignore[arg-type]
            config=dict(training.config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
        )
        self.run_id, self.name = self.run.id, place.name
        self.place = self.run.url or str(self.run.settings.sync_dir)

    @classmethod
    def is_off(cls, settings: TrackingConfig) -> bool:
        return wandb_mode(settings.wandb.mode) == "disabled"

    def write(self, row: Mapping[str, Any]) -> None:
        self.run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])

    def record(self, kind: str, folder: Path, *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        """Log one stage's folder as an artifact: a reference and metadata, not its files.

        W&B can link a consumed artifact only online.
        """
        use = self.run.use_artifact if consumed and not self.run.offline else self.run.log_artifact
        use(make_artifact(f"{self.name}-{kind}", kind, folder, facts))

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))

    def abandon(self) -> None:
        """Unregister W&B's exit handler. The call itself fails too."""
        import wandb

        wandb.teardown()


def make_artifact(name: str, kind: str, folder: Path, facts: Mapping[str, Any] | None) -> Any:
    """Make an artifact that refers to a folder and holds its provenance, or for new checkpoints `facts` and started.json."""
    import wandb

    started = read_started_record(folder.parent) if facts else read_provenance(folder)
    known: dict[str, Any] = {**(started or {}), **({"facts": facts} if facts else {})}
    metadata = {key: known[key] for key in KNOWN if key in known}
    allowed = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[
        -MAX_NAME_CHARACTERS:
    ]  # the run's name may contain any characters
    artifact = wandb.Artifact(allowed, type=kind, metadata=metadata)
    artifact.add_reference(folder.resolve().as_uri(), checksum=False)
    return artifact
