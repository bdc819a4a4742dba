"""The folder that a stage writes into: how it is opened, and what is recovered or deleted after failed and killed runs."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import (
    REPLACED,
    atomic_folder,
    atomic_write_json,
    disk_errors,
    drop_replaced,
    exclusive,
    recover,
    remove_folder,
    remove_scratch_files,
    set_folder_aside,
    unfinished,
)
from minitron_train.stages.provenance import POSITION, STARTED, STOPPED, read_started_record
from minitron_train.stages.stage import Stage, changes_since, contents, plain


@dataclass(frozen=True, slots=True)
class Invocation:
    """What all records of this process share: the command line as typed, and the resolved configuration."""

    command: list[str]
    config: Mapping[str, Any]


def open_folder(stage: Stage, invocation: Invocation, *, fresh: bool) -> AbstractContextManager[Path]:
    """The folder to write into, for as long as the work takes.

    Args:
        fresh: start a resumable stage again instead of resuming it.
    """
    match stage.mode:
        case "atomic":
            return atomic_folder(stage.folder)
        case "resumable":
            return resumable_folder(stage, invocation, fresh=fresh)
        case "self_managed":
            return contextlib.nullcontext(stage.folder)


@contextlib.contextmanager
def resumable_folder(stage: Stage, invocation: Invocation, *, fresh: bool) -> Iterator[Path]:
    """The folder of a resumable stage. Work that is refused before its first step removes a folder that it created.

    With `fresh`, the earlier run's folder is kept under another name until this run publishes its first checkpoint
    (`checkpoint_files.publish`). A failure before that restores the earlier run.
    """
    is_new = fresh or not contents(stage.folder)
    start_folder(stage, invocation, fresh=fresh)
    try:
        yield stage.folder
    except BaseException as error:
        if has_better_predecessor(stage):
            if not (stage.folder / STOPPED).exists():  # stopped.json asks for another start, which starts from scratch
                restore_predecessor(stage)
                say(f"{stage.name}: failed before its first checkpoint; restored the earlier run in {stage.folder}")
        elif isinstance(error, UserError) and is_new and not has_steps(stage.folder):
            remove_folder(stage.folder, first=stage.record, last=STARTED)
        raise
    drop_replaced(stage.folder)


def start_folder(stage: Stage, invocation: Invocation, *, fresh: bool) -> None:
    """Create the folder of a resumable stage and its started.json, or check that an existing one fits.

    Raises:
        UserError: it was started with other inputs or settings and never finished.
    """
    with disk_errors(stage.folder):
        keeps = fresh and (stage.folder / "checkpoints" / "latest").exists() and set_folder_aside(stage.folder)
        if fresh and not keeps:
            remove_folder(stage.folder, first=stage.record, last=STARTED)
        stage.folder.mkdir(parents=True, exist_ok=True)
    started = read_started_record(stage.folder)
    changes = changes_since(started, stage) if started else []
    if changes:
        raise started_differently(stage, "; ".join(changes))
    if started is None:
        record = {"inputs": dict(stage.inputs), "settings": plain(stage.settings)}
        record |= {"command": shlex.join(plain(invocation.command)), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        atomic_write_json(stage.folder / STARTED, record)


def started_differently(stage: Stage, why: str) -> UserError:
    """The error for a resumable stage whose inputs or settings have changed: it is neither resumed nor overwritten."""
    return UserError(
        f"{stage.folder}: was started with different settings ({why}); set another output_dir, restore the setting, "
        "or give force=true to start again"
    )


def has_better_predecessor(stage: Stage) -> bool:
    """Whether a training has no checkpoint yet, while the run that it is to replace is still kept."""
    latest = stage.folder / "checkpoints" / "latest"
    has_result = latest.exists() or (stage.folder / stage.record).exists()
    return stage.mode == "resumable" and predecessor(stage).exists() and not has_result


def predecessor(stage: Stage) -> Path:
    """Where the run that a training replaces is kept until the first checkpoint."""
    return stage.folder.with_name(stage.folder.name + REPLACED)


def resumed_folder(stage: Stage) -> Path:
    """The folder whose records decide how a start without force=true continues; `restore_predecessor` may rename it."""
    return predecessor(stage) if has_better_predecessor(stage) else stage.folder


def restore_predecessor(stage: Stage) -> None:
    """Delete this run of a training and give the folder back to the earlier one."""
    remove_folder(stage.folder, first=stage.record, last=STARTED)
    recover(stage.folder)


def has_steps(folder: Path) -> bool:
    """Whether a training has taken a step, or a teacher cache has begun to grow."""
    steps = folder / "metrics.jsonl"
    has_metrics = steps.exists() and steps.stat().st_size > 0
    return has_metrics or (folder / POSITION).exists() or any(folder.glob("checkpoints/step_*"))


def clean_finished(stage: Stage) -> None:
    """Delete the scratch files of killed runs that tried to repeat a finished stage.

    Nothing is deleted while another process works on the stage, or where this user may not write.
    """
    with contextlib.suppress(UserError, OSError):
        if stage.lock.exists() or unfinished(stage.folder):
            with exclusive(stage.lock, stage.folder):
                recover(stage.folder)
        remove_scratch_files(stage.folder)
