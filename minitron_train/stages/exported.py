"""exported.json of an output folder: where the last export wrote the student, if elsewhere. eval, report and card find it."""

from pathlib import Path
from typing import TypedDict

from minitron_train.runtime.files import atomic_write_json
from minitron_train.runtime.records import read_record

EXPORTED = "exported.json"  # in output_dir: {"folder"}, the student's folder where the last export wrote it elsewhere


def note_export(output_dir: Path, student: Path) -> None:
    """Remember where the last export wrote the student, for eval, report and the card."""
    record = output_dir / EXPORTED
    if student.resolve() == (output_dir / "student").resolve():
        record.unlink(missing_ok=True)
    elif exported(output_dir) != student.absolute():
        atomic_write_json(record, {"folder": str(student.absolute())})


def exported(output_dir: Path) -> Path | None:
    """The folder that the last export wrote outside of `output_dir`/student; None where there is none any more."""
    try:
        record = read_record(output_dir / EXPORTED, ExportRecord, "remove it, and give export.path=FOLDER")
    except FileNotFoundError:
        return None
    folder = Path(record["folder"])
    return folder if (folder / "config.json").is_file() else None


class ExportRecord(TypedDict):
    """exported.json."""

    folder: str
