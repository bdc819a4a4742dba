"""Stages: a folder each, written whole or not at all, with a provenance.json that says how it came about.

A stage is recognised as finished by its provenance. It is stale when an input or a setting that decides its result has
changed; then it is done again, and only a successful run replaces the old folder. A folder with files that no stage has
written is never touched.
"""

import contextlib
import hashlib
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from minitron_train.config.renamed import current_settings
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import (
    PARTIAL,
    REPLACED,
    atomic_folder,
    atomic_write_json,
    disk_errors,
    drop_replaced,
    exclusive,
    parent_folders,
    recover,
    remove_folder,
    remove_scratch_files,
    set_aside,
    standing,
    unfinished,
)
from minitron_train.runtime.launch import whole_number
from minitron_train.runtime.masking import mask_credentials
from minitron_train.stages.environment import Meter, git_commit, package_versions
from minitron_train.stages.provenance import Provenance, Started, read, read_started

PROVENANCE = "provenance.json"
STARTED = "started.json"  # of a growing stage: inputs and settings that it must go on with
STOPPED = "stopped.json"  # of a training after a signal: {"signal", "step", "num_steps"}; start again to go on
DATA = "data "  # begins the labels of inputs that describe the blend (see data.sources.identity)
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
OF_NOTHING = hashlib.sha256().hexdigest()  # the digest of an empty folder's listing

State = Literal["missing", "finished", "stale", "damaged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of the chain.

    Attributes:
        inputs: fingerprint of everything that is read, by label.
        settings: the part of the configuration that decides the result (not where it runs, nor how it is logged).
        manner: `whole`, written beside and renamed; `grows`, in place over many runs (training), never redone unasked;
            `itself`, the work brings its own atomic folder (downloads).
        parent: the folder that this one was made from.
    """

    name: str
    folder: Path
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    parent: Path | None = None
    manner: Literal["whole", "grows", "itself"] = "whole"
    record: str = PROVENANCE  # name of the provenance file
    notes: tuple[str, ...] = field(default=())  # for dry_run: what is kept, and the like

    def state(self) -> tuple[State, str]:
        """Whether the work is done, and what has changed since, or what is wrong with its record."""
        try:
            old = read_provenance(self.folder, self.record)
        except UserError as error:
            return "damaged", str(error)
        if old is None:
            return "missing", ""
        changes = changes_since(old, self)
        return ("stale", "; ".join(changes)) if changes else ("finished", "")

    @property
    def lock(self) -> Path:
        """The file whose lock the process at work holds: beside the folder, which may be replaced as a whole."""
        return self.folder.with_name(f".{self.folder.name}.{self.record.removesuffix(PROVENANCE)}lock")

    def describe(self) -> list[str]:
        """Lines for dry_run, which refuses what a run would refuse (see `refuse_foreign`)."""
        refuse_foreign(self)
        state, why = self.state()
        lines = [f"{self.name}: {state}{f' ({why})' if why else ''}"]
        found = {label: f"{label} {short(value)}" for label, value in self.inputs.items()}
        blend = [text.removeprefix(DATA) for label, text in found.items() if label.startswith(DATA)]
        lines += [f"  reads   {text}" for label, text in found.items() if not label.startswith(DATA)]
        lines += [f"  reads   data: {', '.join(blend)}"] if blend else []
        return [*lines, f"  writes  {self.folder}", *(f"  {note}" for note in self.notes)]


@dataclass(frozen=True, slots=True)
class Invocation:
    """What every provenance.json of this process has in common."""

    command: list[str]
    config: Mapping[str, Any]


Work = Callable[[Path], Mapping[str, Any]]
OnFirst = Callable[[Callable[[], Any]], Any]  # Workspace.on_first


def run_stage(stage: Stage, invocation: Invocation, work: Work, *, force: bool, on_rank0: OnFirst) -> bool:
    """Do the stage's work unless it is done. All ranks call it; rank 0 writes and renames.

    Args:
        work: gets the folder to write into and returns facts for provenance.json.

    Returns:
        Whether the work was done now.

    Raises:
        UserError: another process is at work in the folder, it holds something else, or a growing stage was started
            otherwise.
    """
    if force and on_rank0(lambda: begun_before_requeue(stage)):
        say(f"{stage.name}: begun by this job before it was requeued; going on with that")
        force = False
    with ExitStack() as held:  # on rank 0: the lock, then the folder
        state, why = on_rank0(lambda: begin(stage, held, force=force))
        if state == "finished" and not force:
            say(f"{stage.name}: done before, in {stage.folder} (force=true does it again)")
            return False
        if state == "stale" and stage.manner == "grows" and not force:
            raise started_otherwise(stage, why)
        if state == "stale":
            say(f"{stage.name}: {stage.folder} is stale ({why}); doing it again")
        else:
            say(f"{stage.name}: writing {stage.folder}")
        meter = Meter()
        fresh = state == "stale" or force
        place = on_rank0(lambda: held.enter_context(open_folder(stage, invocation, fresh=fresh)))
        facts = work(place)

        def finish() -> None:
            write_provenance(stage, invocation, meter, facts, place)
            held.close()  # the folder takes its place

        on_rank0(finish)
    say(f"{stage.name}: {meter.seconds:.1f} s, peak memory {meter.peak_bytes / 2**30:.2f} GiB")
    return True


def begin(stage: Stage, held: ExitStack, *, force: bool) -> tuple[State, str]:
    """Return the stage's state. Unless the stage will be skipped, take its lock and clean up after killed runs."""
    found = stage.state()
    if not force:
        refuse_damaged(stage, *found)
    if found[0] == "finished" and stage.folder.exists() and not force:
        clean_finished(stage)
        return found
    held.enter_context(parent_folders(stage.folder))
    held.enter_context(exclusive(stage.lock, stage.folder))
    refuse_foreign(stage)
    if is_worth_less(stage):
        put_back(stage)
    recover(stage.folder)
    return stage.state()


def is_worth_less(stage: Stage) -> bool:
    """Whether a training has no checkpoint yet, and the one that it is to replace still waits aside."""
    latest = stage.folder / "checkpoints" / "latest"
    waiting = stage.folder.with_name(stage.folder.name + REPLACED)
    return (
        stage.manner == "grows" and waiting.exists() and not (latest.exists() or (stage.folder / stage.record).exists())
    )


def clean_finished(stage: Stage) -> None:
    """Delete what a killed run, which tried to do a finished stage again, left of its attempt.

    Nothing is deleted while another process works on the stage, or where this user may not write.
    """
    with contextlib.suppress(UserError, OSError):
        if stage.lock.exists() or unfinished(stage.folder):
            with exclusive(stage.lock, stage.folder):
                recover(stage.folder)
        remove_scratch_files(stage.folder)


def refuse_foreign(stage: Stage) -> None:
    """Refuse a folder that no stage has made, for a stage may empty its folder; downloads look for themselves.

    Raises:
        UserError: there are files in it, but no record of this program; or they are another stage's.
    """
    folder = stage.folder
    if stage.manner == "itself":
        return
    with disk_errors(folder):
        present = contents(folder)
        ours = any((folder / mark).is_file() for mark in (stage.record, STARTED))
    other = None
    with contextlib.suppress(UserError):  # a damaged record tells no stage; force=true replaces it
        other = read_provenance(folder, stage.record)
    if other is not None and other["stage"] != stage.name:
        raise UserError(
            f"{stage.name}: {folder} holds the result of another stage ({other['stage']}); choose another output_dir (export: "
            "another export.path)"
        )
    if present and not ours:
        raise UserError(
            f"{stage.name}: {folder} holds files that this program did not write (as {present[0]}), and a stage has its "
            "folder to itself; move them, or choose another output_dir (export: another export.path)"
        )


def refuse_damaged(stage: Stage, state: State, why: str) -> None:
    """Refuse a stage whose record is damaged: the rest of its folder may be whole, and is replaced only with force=true.

    Raises:
        UserError: the line about the record, or that the folder is somebody else's.
    """
    if state == "damaged":
        refuse_foreign(stage)
        raise UserError(why)


def contents(folder: Path) -> list[str]:
    """Names in a stage's folder, without what a kill left of a file that was being written."""
    return sorted(path.name for path in folder.iterdir() if PARTIAL not in path.name) if folder.exists() else []


def begun_before_requeue(stage: Stage) -> bool:
    """Whether this is a requeued Slurm job that began the stage earlier: it still has force=true among its words."""
    job = os.environ.get("SLURM_JOB_ID")
    if is_worth_less(stage) or job is None or not whole_number(os.environ, "SLURM_RESTART_COUNT", 0):
        return False
    records = (read_provenance(stage.folder, stage.record), read_started_record(stage.folder))
    return any(record is not None and record.get("slurm_job") == job for record in records)


def open_folder(stage: Stage, invocation: Invocation, *, fresh: bool) -> AbstractContextManager[Path]:
    """The folder to write into, for as long as the work takes."""
    match stage.manner:
        case "whole":
            return atomic_folder(stage.folder)
        case "grows":
            return growing_folder(stage, invocation, fresh=fresh)
        case "itself":
            return contextlib.nullcontext(stage.folder)


@contextlib.contextmanager
def growing_folder(stage: Stage, invocation: Invocation, *, fresh: bool) -> Iterator[Path]:
    """The folder of a growing stage; work that is refused before its first step leaves none that was not there before.

    With `fresh`, checkpoints of an earlier run wait aside until the first of this one (`checkpoint_files.publish`); a failure
    before it puts the earlier run back.
    """
    is_new = fresh or not contents(stage.folder)
    start_folder(stage, invocation, fresh=fresh)
    try:
        yield stage.folder
    except BaseException as error:
        if is_worth_less(stage):
            if not (stage.folder / STOPPED).exists():  # the mark asks for another start, which begins anew
                put_back(stage)
                say(f"{stage.name}: ended before its first checkpoint; {stage.folder} holds the earlier run again")
        elif isinstance(error, UserError) and is_new and not has_steps(stage.folder):
            remove_folder(stage.folder, first=stage.record, last=STARTED)
        raise
    drop_replaced(stage.folder)


def has_steps(folder: Path) -> bool:
    """Whether a training has taken a step."""
    steps = folder / "metrics.jsonl"
    return (steps.exists() and steps.stat().st_size > 0) or any(folder.glob("checkpoints/step_*"))


def put_back(stage: Stage) -> None:
    """Let the earlier run of a training, which waits aside, take the place of this one."""
    remove_folder(stage.folder, first=stage.record, last=STARTED)
    recover(stage.folder)


def start_folder(stage: Stage, invocation: Invocation, *, fresh: bool) -> None:
    """The folder of a growing stage, with a record of what it was started with.

    Raises:
        UserError: it was started with other inputs or settings and never finished.
    """
    with disk_errors(stage.folder):
        keeps = fresh and (stage.folder / "checkpoints" / "latest").exists() and set_aside(stage.folder)
        if fresh and not keeps:
            remove_folder(stage.folder, first=stage.record, last=STARTED)
        stage.folder.mkdir(parents=True, exist_ok=True)
    started = read_started_record(stage.folder)
    changes = changes_since(started, stage) if started else []
    if changes:
        raise started_otherwise(stage, "; ".join(changes))
    if started is None:
        record = {"inputs": dict(stage.inputs), "settings": plain(stage.settings)}
        record |= {"command": shlex.join(plain(invocation.command)), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        atomic_write_json(stage.folder / STARTED, record)


def started_otherwise(stage: Stage, why: str) -> UserError:
    """The refusal to go on with a growing stage, or to overwrite it unasked."""
    return UserError(
        f"{stage.folder}: was started with different settings ({why}); set another output_dir, restore the setting, "
        "or give force=true to start again"
    )


def write_provenance(
    stage: Stage, invocation: Invocation, meter: "Meter", facts: Mapping[str, Any], folder: Path
) -> None:
    """provenance.json of one stage."""
    record = {
        "stage": stage.name,
        "command": shlex.join(plain(invocation.command)),
        "config": plain(invocation.config),
        "settings": plain(stage.settings),
        "inputs": dict(stage.inputs),
        "parent": str(stage.parent) if stage.parent else None,
        "packages": package_versions(),
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "started_at": meter.started_at,
        "wall_seconds": round(meter.seconds, 3),
        "peak_rss_bytes": meter.peak_bytes,
        "facts": plain(facts),
    }
    atomic_write_json(folder / stage.record, record)


def read_provenance(folder: Path, record: str = PROVENANCE) -> Provenance | None:
    """provenance.json of a finished stage; None when it is unfinished. Only reads: others may be at work.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read(standing(folder) / record)
    except FileNotFoundError:
        return None


def read_started_record(folder: Path) -> Started | None:
    """started.json of a growing stage; None when it has not begun.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_started(standing(folder) / STARTED)
    except FileNotFoundError:
        return None


def changes_since(record: Started | Provenance, stage: Stage) -> list[str]:
    """How a stage differs from the one that a record describes."""
    inputs = differences(record["inputs"], stage.inputs, "input ")
    return inputs + differences(current_settings(record["settings"], None), plain(stage.settings), "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], label: str) -> list[str]:
    """What changed between two flat or nested mappings: "student.hidden_size was 504, is 480"."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += differences(before, after, f"{label}{key}.")
        elif before != after:
            changes.append(f"{label}{key} was {short(before)}, is {short(after)}")
    return changes


def short(value: Any) -> str:
    """A value for the user: of each sha256 in it the first 12 digits, or `nothing` for the sha256 of no bytes."""
    return DIGEST.sub(lambda found: "nothing" if found[0] == OF_NOTHING else found[0][:12], str(value))


def plain(value: Any) -> Any:
    """JSON-able copy for a record: enums by name, paths and other objects as text, credentials masked."""
    if isinstance(value, Mapping):
        return {mask_credentials(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int | float | bool) or value is None:
        return value
    return mask_credentials(value.name if isinstance(value, Enum) else str(value))
