"""What a checkpoint is on disk, and which of them are good. No torch here: a checkpoint is a folder of files with a manifest.

checkpoints/
  model/                   config.json and tokenizer of the student, for `export`
  step_00000200/           one checkpoint; this name appears by a rename, after everything in it is on disk
    manifest.json          step, tokens, evaluation, the settings it belongs to; size and sha256 of every other file
    __0_0.distcp, …        megatron-core's files
  step_00000300.partial-…  being written, or left by a killed run: never read
  step_00000200.replaced   makes way for a new one of the same step; after a kill it gets its name back
  latest, best             text files with the name of a checkpoint
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from minitron_train.config import CheckpointConfig
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import (
    PARTIAL,
    REPLACED,
    atomic_write_text,
    disk_errors,
    drop_replaced,
    sha256_file,
    sync_path,
)
from minitron_train.runtime.records import Count, damaged, read_bytes, read_record
from minitron_train.train.best import BestMetric

MANIFEST = "manifest.json"
SUMS = "sums-{rank}.json"  # what one rank's writer wrote, until the manifest takes it over
MANIFEST_REMEDY = "restore it from a copy, or use another checkpoint"
MAX_POINTER_BYTES = 100  # of `latest` and `best`; a file of weights given in their place is not read

FileName = Annotated[str, Meta(pattern="^[^/\\0]+$")]  # nothing outside the checkpoint


class Sum(TypedDict):
    """Size and hash of one file."""

    bytes: Count
    sha256: str


class Manifest(TypedDict, total=False):
    """manifest.json, without what only people read."""

    step: Required[Count]
    files: Required[dict[FileName, Sum]]
    belongs_to: Required[dict[str, Any]]
    evaluation: dict[str, float | None]  # by TASK.METRIC


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return folder / f"step_{step:08d}"


def is_file_name(name: Any) -> bool:
    """Whether `name` is the name of a file in the same folder, not a path that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def finished(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((path for path in folder.glob("step_????????") if (path / MANIFEST).exists()), reverse=True)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a finished checkpoint.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged.
    """
    return read_record(path / MANIFEST, Manifest, MANIFEST_REMEDY)


def read_pointer(file: Path) -> Path:
    """The checkpoint that `latest` or `best` names.

    Raises:
        UserError: the file names none.
    """
    text = read_bytes(file, max_bytes=MAX_POINTER_BYTES).decode(errors="replace").strip()
    if not re.fullmatch(r"step_[0-9]{8}", text, re.ASCII):
        remedy = "name the folder of a checkpoint itself, checkpoints/step_…"
        raise damaged(str(file), "does not hold the name of a checkpoint", remedy)
    return file.with_name(text)


def describe(file: Path) -> Sum:
    """Size and hash of one file."""
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def write_sums(folder: Path, files: Iterable[Path], rank: int) -> None:
    """Note what `rank` has written; runs in the writer's thread, so that hashing does not hold up training."""
    sums = {file.name: describe(file) for file in files}
    (folder / SUMS.format(rank=rank)).write_text(json.dumps(sums), encoding="utf-8")


def publish(scratch: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Complete the manifest, make everything durable, then let the checkpoint appear and `latest` point to it.

    An earlier run that waits beside this one's folder is deleted then (`stages.folders.resumable_folder`).
    """
    sums: dict[str, Sum] = {}
    for part in scratch.glob(SUMS.format(rank="*")):
        sums |= read_record(part, dict[FileName, Sum], "save again")
        part.unlink()
    for file in scratch.iterdir():
        if file.name not in sums:
            sums[file.name] = describe(file)
        sync_path(file)
    manifest = scratch / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": sums}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync_path(manifest)
    sync_path(scratch)
    replaced = path.with_name(path.name + REPLACED)
    if path.exists():  # of the same step: damaged, or saved before its evaluation
        move(path, replaced)
    scratch.rename(path)
    sync_path(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    point(path.parent / "latest", path)
    drop_replaced(path.parents[1])


def damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Of its files, every `shares`-th is read, beginning with `share`."""
    try:
        files = read_manifest(path)["files"]
    except (OSError, UserError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    for name in sorted(files)[share::shares]:
        file, noted = path / name, files[name]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != noted["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {noted['bytes']:,}"
        if sha256_file(file) != noted["sha256"]:
            return f"{name} has changed (sha256)"
    return None


def move(path: Path, target: Path) -> None:
    """Rename a checkpoint; what an earlier deletion has left under the new name goes."""
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def remove(path: Path) -> None:
    """Delete a checkpoint: its name goes at once, and what is left of it is never read."""
    doomed = path.with_name(f"{path.name}{PARTIAL}removed")
    move(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def settle(path: Path, settings: CheckpointConfig, yardstick: BestMetric) -> None:
    """Make `path`, from which a run resumes, the newest checkpoint, and do what a kill may have left undone after its save.

    Everything newer is removed. It is damaged, and would otherwise count as the newest and perhaps as the best.
    """
    for newer in finished(path.parent):
        if newer > path:
            remove(newer)
    point(path.parent / "latest", path)
    tidy(path.parent, settings, yardstick)


def point(name: Path, path: Path) -> None:
    """Make the text file `name` (latest, best) hold the name of the checkpoint `path`."""
    text = path.name + "\n"
    if not name.is_file() or name.read_bytes() != text.encode():
        atomic_write_text(name, text)


def recover(folder: Path) -> None:
    """Clean up after killed runs: put back a checkpoint that was being replaced, delete unfinished work."""
    for old in folder.glob(f"step_*{REPLACED}"):
        path = old.with_name(old.name.removesuffix(REPLACED))
        if path.exists() or not (old / MANIFEST).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
            sync_path(folder)
    for path in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def tidy(folder: Path, settings: CheckpointConfig, yardstick: BestMetric) -> None:
    """Keep the newest `checkpoint.keep` and the `checkpoint.keep_best` best evaluated; `best` names the very best."""
    paths = finished(folder)
    ranks = {path: yardstick.rank(evaluation_of(path).get(yardstick.name)) for path in paths}
    best = sorted((path for path in paths if math.isfinite(ranks[path])), key=lambda path: (ranks[path], path.name))
    if best and settings.keep_best:
        point(folder / "best", best[0])
    else:
        with disk_errors(folder / "best"):
            (folder / "best").unlink(missing_ok=True)
    for path in set(paths[settings.keep :]) - set(best[: settings.keep_best]):
        remove(path)


def evaluation_of(path: Path) -> dict[str, float | None]:
    """The evaluation noted in a manifest, by TASK.METRIC; empty when there was none, or the manifest is unreadable."""
    try:
        return read_manifest(path).get("evaluation", {})
    except (OSError, UserError):
        return {}
