"""data_files.json of a training: the files that it began with, so that a resumed run can name what changed."""

from dataclasses import asdict
from pathlib import Path

from minitron_train.config import DataConfig
from minitron_train.data.identity import FileRecord, changes
from minitron_train.data.sources import file_records
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_json
from minitron_train.runtime.records import read_record

DATA_FILES = "data_files.json"
SHOWN = 3  # files in a message


def write_data_files(folder: Path, data: DataConfig) -> None:
    """Record the files of the blend in a training's folder, at its first start."""
    path = folder / DATA_FILES
    if not path.exists():
        atomic_write_json(path, [asdict(record) for record in file_records(data)])


def check_data_files(folder: Path, data: DataConfig) -> None:
    """Refuse to resume a training whose files have changed. Warn if only the time of a large file has.

    Raises:
        UserError: names the files that were rewritten, cut off, replaced, added or removed.
    """
    path = folder / DATA_FILES
    try:
        old = read_record(path, list[FileRecord], "remove it to resume without this check")
    except FileNotFoundError:
        return
    changed, doubtful = changes(old, file_records(data))
    if changed:
        raise UserError(
            f"{folder}: was started with different data ({listed(changed)}); restore the files, set another output_dir, "
            "or give force=true to start again"
        )
    if doubtful:
        say(f"warning: {folder} resumes, but its data may have changed: {listed(doubtful)}")


def listed(lines: list[str]) -> str:
    """The first lines, and the number of the others."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])
