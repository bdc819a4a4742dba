"""Run a stage: skip it when it is finished, lock its folder, do the work, write its provenance.

A stage is finished when its folder holds its provenance. It is stale when an input or a setting that decides its result
has changed. A stale stage runs again, and only a successful run replaces the old folder. A folder with files that no
stage has written is never touched.
"""

import os
import platform
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_json, exclusive, parent_folders, recover
from minitron_train.runtime.launch import whole_number
from minitron_train.stages.environment import Meter, git_commit, package_versions
from minitron_train.stages.folders import (
    Invocation,
    clean_finished,
    has_better_predecessor,
    open_folder,
    restore_predecessor,
    started_differently,
)
from minitron_train.stages.provenance import read_provenance, read_started_record
from minitron_train.stages.stage import Stage, State, plain, refuse_foreign

Work = Callable[[Path], Mapping[str, Any]]
OnFirst = Callable[[Callable[[], Any]], Any]  # Workspace.on_rank0: runs a function on rank 0, returns its value on all


def run_stage(stage: Stage, invocation: Invocation, work: Work, *, force: bool, on_rank0: OnFirst) -> bool:
    """Do the stage's work unless it is finished. All ranks call it; rank 0 writes and renames.

    Args:
        work: gets the folder to write into and returns facts for provenance.json.

    Returns:
        Whether this call did the work.

    Raises:
        UserError: another process is at work in the folder, it holds something else, or a resumable stage was started
            with different settings.
    """
    if force and on_rank0(lambda: begun_before_requeue(stage)):
        say(f"{stage.name}: this job began it before it was requeued; resuming despite force=true")
        force = False
    with ExitStack() as held:  # on rank 0: the lock, then the folder
        state, why = on_rank0(lambda: begin(stage, held, force=force))
        if state == "finished" and not force:
            say(f"{stage.name}: already finished in {stage.folder} (force=true runs it again)")
            return False
        if state == "stale" and stage.mode == "resumable" and not force:
            raise started_differently(stage, why)
        if state == "stale":
            say(f"{stage.name}: {stage.folder} is stale ({why}); running it again")
        else:
            say(f"{stage.name}: writing {stage.folder}")
        meter = Meter()
        fresh = state == "stale" or force
        place = on_rank0(lambda: held.enter_context(open_folder(stage, invocation, fresh=fresh)))
        facts = work(place)

        def finish() -> None:
            write_provenance(stage, invocation, meter, facts, place)
            held.close()  # renames the folder to its final name

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
    if has_better_predecessor(stage):
        restore_predecessor(stage)
    recover(stage.folder)
    return stage.state()


def refuse_damaged(stage: Stage, state: State, why: str) -> None:
    """Refuse a stage whose record is damaged. Its other files may be intact: only force=true replaces them.

    Raises:
        UserError: the line about the record, or that the folder is not this stage's.
    """
    if state == "damaged":
        refuse_foreign(stage)
        raise UserError(why)


def begun_before_requeue(stage: Stage) -> bool:
    """Whether this is a requeued Slurm job that began the stage earlier; its command line still says force=true."""
    job = os.environ.get("SLURM_JOB_ID")
    if has_better_predecessor(stage) or job is None or not whole_number(os.environ, "SLURM_RESTART_COUNT", 0):
        return False
    records = (read_provenance(stage.folder, stage.record), read_started_record(stage.folder))
    return any(record is not None and record.get("slurm_job") == job for record in records)


def write_provenance(
    stage: Stage, invocation: Invocation, meter: Meter, facts: Mapping[str, Any], folder: Path
) -> None:
    """Write the record that marks the stage as finished."""
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
