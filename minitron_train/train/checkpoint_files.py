"""The files of a checkpoint, and whether they are intact. The module does not load torch.

checkpoints/
  model/                   config.json and tokenizer of the student, for `export`
  step_00000200/           one checkpoint; this name appears by a rename, after everything in it is on disk
    manifest.json          step, tokens, evaluation, the run's deciding settings; size and sha256 of every other file
    __0_0.distcp, …        megatron-core's files
  step_00000300.partial-…  a checkpoint that is being written, or left by a killed run: never read
  step_00000200.replaced   the old checkpoint while a new one of the same step replaces it; restored after a kill
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
SUMS = "sums-{rank}.json"  # hashes of one rank's files, until the manifest includes them
MANIFEST_REMEDY = "restore it from a copy, or use another checkpoint"
MAX_POINTER_BYTES = 100  # a larger file is neither `latest` nor `best` and is not read

FileName = Annotated[str, Meta(pattern="^[^/\\0]+$")]  # a file in the checkpoint's own folder


class Sum(TypedDict):
    """Size and hash of one file."""

    bytes: Count
    sha256: str


class Manifest(TypedDict, total=False):
    """The fields of manifest.json that the program reads."""

    step: Required[Count]
    files: Required[dict[FileName, Sum]]
    belongs_to: Required[dict[str, Any]]
    evaluation: dict[str, float | None]  # by TASK.METRIC


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def is_file_name(name: Any) -> bool:
    """Whether `name` is a plain file name, not a path to another folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def finished(folder: Path) -> list[Path]:
    """Return the finished checkpoints, newest first."""
    return sorted((path for path in folder.glob("step_????????") if (path / MANIFEST).exists()), reverse=True)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a finished checkpoint.

    Raises:
        FileNotFoundError: it does not exist.
        UserError: it is damaged.
    """
    return read_record(path / MANIFEST, Manifest, MANIFEST_REMEDY)


def read_pointer(file: Path) -> Path:
    """Return the checkpoint that the file `latest` or `best` names.

    Raises:
        UserError: the file does not contain the name of a checkpoint.
    """
    text = read_bytes(file, max_bytes=MAX_POINTER_BYTES).decode(errors="replace").strip()
    if not re.fullmatch(r"step_[0-9]{8}", text, re.ASCII):
        remedy = "give the folder of a checkpoint, checkpoints/step_…"
        raise damaged(str(file), "does not contain the name of a checkpoint", remedy)
    return file.with_name(text)


def describe(file: Path) -> Sum:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def write_sums(folder: Path, files: Iterable[Path], rank: int) -> None:
    """Record size and hash of the files that `rank` has written. Runs in the writer's thread, so training does not wait."""
    sums = {file.name: describe(file) for file in files}
    (folder / SUMS.format(rank=rank)).write_text(json.dumps(sums), encoding="utf-8")


def publish(scratch: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest, sync all files to disk, rename the checkpoint to its final name, and update `latest`.

    This also deletes the earlier run that a forced restart has kept until now (`stages.folders.resumable_folder`).
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
    if path.exists():  # a checkpoint of the same step: damaged, or saved before its evaluation
        move(path, replaced)
    scratch.rename(path)
    sync_path(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    write_pointer(path.parent / "latest", path)
    drop_replaced(path.parents[1])


def find_damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """Describe the damage of a checkpoint, or return None. Rank `share` of `shares` ranks reads every `shares`-th file."""
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
    """Rename a checkpoint, and delete what an interrupted deletion may have left under the new name."""
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def remove(path: Path) -> None:
    """Delete a checkpoint. Rename it first, so that a partly deleted folder is never read."""
    doomed = path.with_name(f"{path.name}{PARTIAL}removed")
    move(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def make_newest(path: Path, settings: CheckpointConfig, best_metric: BestMetric) -> None:
    """Make the resumed checkpoint `path` the newest one, and complete the cleanup that a kill may have interrupted.

    Newer checkpoints are damaged. They are removed, so that they count neither as the newest nor as the best.
    """
    for newer in finished(path.parent):
        if newer > path:
            remove(newer)
    write_pointer(path.parent / "latest", path)
    remove_old(path.parent, settings, best_metric)


def write_pointer(name: Path, path: Path) -> None:
    """Write the name of the checkpoint `path` into the text file `name` (latest or best)."""
    text = path.name + "\n"
    if not name.is_file() or name.read_bytes() != text.encode():
        atomic_write_text(name, text)


def recover(folder: Path) -> None:
    """Clean up after killed runs: restore a checkpoint that was being replaced, delete unfinished ones."""
    for old in folder.glob(f"step_*{REPLACED}"):
        path = old.with_name(old.name.removesuffix(REPLACED))
        if path.exists() or not (old / MANIFEST).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
            sync_path(folder)
    for path in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_old(folder: Path, settings: CheckpointConfig, best_metric: BestMetric) -> None:
    """Keep the `checkpoint.keep` newest and the `checkpoint.keep_best` best checkpoints, and let `best` name the best one."""
    paths = finished(folder)
    ranks = {path: best_metric.rank(evaluation_of(path).get(best_metric.name)) for path in paths}
    best = sorted((path for path in paths if math.isfinite(ranks[path])), key=lambda path: (ranks[path], path.name))
    if best and settings.keep_best:
        write_pointer(folder / "best", best[0])
    else:
        with disk_errors(folder / "best"):
            (folder / "best").unlink(missing_ok=True)
    for path in set(paths[settings.keep :]) - set(best[: settings.keep_best]):
        remove(path)


def evaluation_of(path: Path) -> dict[str, float | None]:
    """Return the evaluation in a manifest, by TASK.METRIC; empty if it has none or is unreadable."""
    try:
        return read_manifest(path).get("evaluation", {})
    except (OSError, UserError):
        return {}
