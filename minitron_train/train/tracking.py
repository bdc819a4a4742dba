"""Weights & Biases: the metrics of metrics.jsonl, one run across restarts, and the model's lineage as artifacts."""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.config import WandbConfig, WandbMode
from minitron_train.runtime.console import say
from minitron_train.stages import read_provenance, read_started_record

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


class Tracker:
    """One W&B run, on rank 0. With mode `disabled` it does nothing."""

    def __init__(
        self, settings: WandbConfig, *, folder: Path, name: str, run_id: str | None, config: Mapping[str, Any]
    ) -> None:
        self.run: Any = None
        place = run_place(settings, folder, name)
        self.run_id, self.name = run_id, place.name
        mode = wandb_mode(settings.mode)
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            (place.folder / "wandb").mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(
                project=place.project,
                entity=place.entity,
                name=place.name,
                dir=str(place.folder),
                id=run_id,
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
            )
        except Exception as error:  # training continues without a key or a network
            say(f"W&B could not start ({error}); metrics.jsonl has all metrics, and the next start tries again")
            return
        self.run_id = self.run.id

    def record(self, kind: str, folder: Path, *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        """Log one stage's folder as an artifact: a reference and metadata, not its files.

        Args:
            consumed: the run has read the folder; otherwise it has written it. W&B can link a consumed artifact only online.
        """

        def link() -> None:
            use = self.run.use_artifact if consumed and not self.run.offline else self.run.log_artifact
            use(make_artifact(f"{self.name}-{kind}", kind, folder, facts))

        if self.run is not None:
            self._send(link)

    def write(self, row: Mapping[str, Any]) -> None:
        if self.run is not None:
            values = {key: value for key, value in row.items() if value is not None}
            self._send(lambda: self.run.log(values, step=row["step"]))

    def close(self, *, failed: bool = False) -> None:
        """Send pending data and finish the run."""
        if self.run is not None:
            self._send(lambda: self.run.finish(exit_code=int(failed)))
            self.run = None

    def _send(self, action: Callable[[], object]) -> None:
        """Run `action`, and continue without W&B if it fails. A scheduler's SIGTERM, for example, also ends W&B's process."""
        try:
            action()
        except Exception as error:  # no W&B error may stop training; metrics.jsonl has all metrics
            import wandb

            say(f"W&B failed ({error}); metrics.jsonl continues, and the next start resumes the W&B run")
            self.run = None
            with contextlib.suppress(Exception):
                wandb.teardown()  # fails too, but unregisters an exit handler that would fail again


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
