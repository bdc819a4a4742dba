"""exported.json: where the last export wrote the student if export.path is set. eval, report and card read it."""

from pathlib import Path
from typing import TypedDict

from minitron_train.runtime.files import atomic_write_json
from minitron_train.runtime.records import read_record

EXPORTED = "exported.json"  # in output_dir: {"folder": the student's folder}


def note_export(output_dir: Path, student: Path) -> None:
    """Record where the last export wrote the student; OUTPUT_DIR/student needs no record."""
    record = output_dir / EXPORTED
    if student.resolve() == (output_dir / "student").resolve():
        record.unlink(missing_ok=True)
    elif exported(output_dir) != student.absolute():
        atomic_write_json(record, {"folder": str(student.absolute())})


def exported(output_dir: Path) -> Path | None:
    """The student's folder if the last export wrote it outside OUTPUT_DIR/student and it still exists; otherwise None."""
    try:
        record = read_record(output_dir / EXPORTED, ExportRecord, "remove it, and give export.path=FOLDER")
    except FileNotFoundError:
        return None
    folder = Path(record["folder"])
    return folder if (folder / "config.json").is_file() else None


class ExportRecord(TypedDict):
    """exported.json."""

    folder: str
