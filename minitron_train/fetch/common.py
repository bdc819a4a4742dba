"""Shared by all downloads: the check of disk space, and source.json, which marks a finished folder."""

import json
import shutil
from pathlib import Path
from typing import Any, TypedDict

from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import byte_size
from minitron_train.runtime.records import read_record
from minitron_train.stages import plain

SOURCE_FILE = "source.json"  # in every fetched folder: its source; written last


class Facts(TypedDict, total=False):
    """The keys of source.json, over all sources."""

    source: str
    requirement: str  # a wheel has this and the next two
    sha256: str
    file: str
    repo_id: str  # a repository has this and the next three
    revision: str
    commit: str
    files: dict[str, str]  # name -> digest
    license: str | None
    rows: dict[str, int]  # rows per evaluation task
    gguf: str  # name of the converted file, and what its header says
    model_name: str | None
    pre_tokenizer: str
    tensor_types: dict[str, int]


def existing_parent(path: Path) -> Path:
    """`path` if it exists, otherwise its nearest ancestor that does."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def require_disk(what: str, needs_bytes: dict[Path, int]) -> None:
    """Print how much disk `what` needs, and refuse if a file system has less.

    Args:
        what: named in the message.
        needs_bytes: bytes to be written below each path; paths on one file system are added up.

    Raises:
        UserError: too little free space.
    """
    by_device: dict[int, tuple[Path, int]] = {}
    for path, num_bytes in needs_bytes.items():
        device = existing_parent(path).stat().st_dev
        first, total = by_device.get(device, (path, 0))
        by_device[device] = (first, total + num_bytes)
    for path, num_bytes in by_device.values():
        free_bytes = shutil.disk_usage(existing_parent(path)).free
        need = f"{what} needs {byte_size(num_bytes)} of disk under {path}"
        if free_bytes < num_bytes:
            remedy = "free space, or set output_dir (downloaded wheels: XDG_CACHE_HOME) to another disk"
            raise UserError(f"{need}: only {byte_size(free_bytes)} are free; {remedy}")
        say(f"{need} ({byte_size(free_bytes)} free)")


def finished_facts(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of a folder that was fetched from the same source before; None if it must be fetched.

    Raises:
        UserError: `folder` holds something that fetch did not make, or a damaged record; it is never overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    record = folder / SOURCE_FILE
    if not record.is_file():
        remedy = "move it, or use it with teacher.path or eval.data_dir"
        raise UserError(f"{folder}: was not made by fetch and is not replaced; {remedy}")
    facts = dict(read_record(record, Facts, f"remove {folder} and fetch again"))
    if all(facts.get(key) == value for key, value in identity.items()):
        say(f"{folder}: already fetched")
        return facts
    say(f"{folder}: came from another source than the recipe names now; fetching again")
    return None


def record_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write source.json into a folder as its last file (see files.atomic_folder)."""
    (folder / SOURCE_FILE).write_text(json.dumps(plain(facts), indent=2) + "\n", encoding="utf-8")
