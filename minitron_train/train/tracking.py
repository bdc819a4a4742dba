"""Weights & Biases: the same numbers as metrics.jsonl, one run across restarts, and the line of descent as artifacts."""

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

KNOWN = ("stage", "command", "settings", "inputs", "parent", "facts", "git_commit")  # of a provenance, in an artifact
MOST_CHARACTERS = 128  # of an artifact's name
YES = ("1", "true", "t", "yes", "y", "on")
MODES = {  # WANDB_MODE -> what it means for one run; wandb's older names included
    **{"online": "online", "offline": "offline", "disabled": "disabled"},
    **{"run": "online", "dryrun": "offline", "shared": "online"},
}


def wandb_mode(mode: WandbMode) -> str:
    """online, offline or disabled: the setting, for auto the environment's, else online with a key; never a prompt."""
    if mode is not WandbMode.auto:
        return mode.value
    if os.environ.get("WANDB_DISABLED", "").lower() in YES:
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in MODES:
        return MODES[asked]
    if asked:
        say(f"WANDB_MODE={asked}: must be one of {', '.join(MODES)}; W&B stays offline")
        return "offline"
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run goes on the server and on this disk, and what it is called."""

    project: str
    entity: str | None
    name: str
    folder: Path


def run_place(settings: WandbConfig, folder: Path, name: str) -> Place:
    """What is set in the configuration, else what the environment says, else our defaults."""
    environ = os.environ
    return Place(
        project=settings.project or environ.get("WANDB_PROJECT") or "minitron_train",
        entity=settings.entity or environ.get("WANDB_ENTITY") or None,
        name=settings.name or environ.get("WANDB_NAME") or name,
        folder=Path(environ.get("WANDB_DIR") or folder),
    )


class Tracker:
    """One W&B run; for rank 0. With mode disabled it does nothing."""

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
        except Exception as error:  # no key, no network: a requeued training must not die of it
            say(f"W&B could not begin ({error}); metrics.jsonl has every figure, and the next start tries again")
            return
        self.run_id = self.run.id

    def record(self, kind: str, folder: Path, *, consumed: bool, facts: Mapping[str, Any] | None = None) -> None:
        """One stage's folder as an artifact: a reference and what is known of it, not its bytes.

        The run has consumed it or made it; W&B links consumed ones online only, offline they are logged as they are.
        """

        def link() -> None:
            use = self.run.use_artifact if consumed and not self.run.offline else self.run.log_artifact
            use(make_artifact(f"{self.name}-{kind}", kind, folder, facts))

        if self.run is not None:
            self._send(link)

    def write(self, row: Mapping[str, Any]) -> None:
        """One step's figures under their own names."""
        if self.run is not None:
            values = {key: value for key, value in row.items() if value is not None}
            self._send(lambda: self.run.log(values, step=row["step"]))

    def close(self, *, failed: bool = False) -> None:
        """Write what is pending."""
        if self.run is not None:
            self._send(lambda: self.run.finish(exit_code=int(failed)))
            self.run = None

    def _send(self, action: Callable[[], object]) -> None:
        """Go on without W&B when that fails: a scheduler's SIGTERM, after which we save, also ends W&B's own process."""
        try:
            action()
        except Exception as error:  # of any kind: the figures are in metrics.jsonl, and training matters more
            import wandb

            say(f"W&B has ended ({error}); metrics.jsonl goes on, and so will the W&B run after the next start")
            self.run = None
            with contextlib.suppress(Exception):
                wandb.teardown()  # which fails too, but takes back what would fail once more at exit


def make_artifact(name: str, kind: str, folder: Path, facts: Mapping[str, Any] | None) -> Any:
    """A reference to a folder with its provenance; of new checkpoints, what their training began with and its facts."""
    import wandb

    started = read_started_record(folder.parent) if facts else read_provenance(folder)
    known: dict[str, Any] = {**(started or {}), **({"facts": facts} if facts else {})}
    metadata = {key: known[key] for key in KNOWN if key in known}
    allowed = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[-MOST_CHARACTERS:]  # a run's name may hold anything
    artifact = wandb.Artifact(allowed, type=kind, metadata=metadata)
    artifact.add_reference(folder.resolve().as_uri(), checksum=False)
    return artifact
