"""Local evaluation data: the files of each lm-eval task, and the check of their columns.

    DATA_DIR/FOLDER/SPLIT.parquet | .jsonl | .jsonl.gz

FOLDER is the task's name or the folder in TASKS; SPLIT is train, dev, validation or test.
"""

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from minitron_train.evaluation.task_names import mmlu_subjects
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.stages import Provenance

NO_HUB = "no Hugging Face hub in reach"  # suffix of the reason why a task without local data was not run
HUB_TIMEOUT_S = 3.0
SPLITS = ("train", "dev", "validation", "test")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
ROW = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, slots=True)
class Local:
    """Folder and columns of a task's files. The columns are checked because jinja renders a missing one as empty text."""

    columns: dict[str, Any]  # name -> type
    folder: str | None = None


QUESTION = {"question": str, "answer": str}
ARC = {"question": str, "choices": dict[str, list[str]], "answerKey": str}
TARGETS = dict[str, list[str | int]]  # choices, labels
TASKS = {
    "hellaswag": Local({"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list[str], "label": int | str}),
    "mmlu": Local({"question": str, "choices": list[str], "answer": int | str}),
    "arc_easy": Local(ARC),
    "arc_challenge": Local(ARC),
    "winogrande": Local({"sentence": str, "option1": str, "option2": str, "answer": int | str}),
    "gsm8k": Local(QUESTION),
    "humaneval": Local({"prompt": str, "test": str, "entry_point": str}),
    "mbpp": Local({"text": str, "code": str, "test_list": list[str]}),
    "truthfulqa_mc1": Local({"question": str, "mc1_targets": TARGETS}, "truthfulqa"),
    "truthfulqa_mc2": Local({"question": str, "mc2_targets": TARGETS}, "truthfulqa"),
    "xlsum_english": Local({"text": str, "summary": str}, "xlsum"),
    "wikitext": Local({"page": str}),
}


def local_files(task: str, data_dir: Path) -> dict[str, Path]:
    """Return split -> file of one lm-eval task; empty if it has no local file. MMLU's subjects are in mmlu/SUBJECT."""
    subject = task.removeprefix("mmlu_") if task in mmlu_subjects() else task
    named = TASKS[task].folder if task in TASKS else None
    folder = data_dir / (named or (task if subject == task else f"mmlu/{subject}"))
    found = {}
    for split in SPLITS:
        existing = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
        if existing:
            found[split] = existing[0]
    return found


def spec_of(task: str) -> Local | None:
    """Return the expected columns of a task's rows; None for a task that is not in TASKS."""
    return TASKS.get("mmlu" if task in mmlu_subjects() else task)


def listing(data_dir: Path) -> str:
    """Return a hash of the names and sizes of all files. It changes when a file is added, removed or resized."""
    files = sorted(path for path in data_dir.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(data_dir)} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def can_be_completed(record: Provenance | None) -> bool:
    """Whether an evaluation (its record) skipped tasks because no hub was reachable, and one is reachable now."""
    reasons = record.get("facts", {}).get("not_run", {}) if record else {}
    lacking = any(reason.endswith(NO_HUB) for reason in reasons.values())
    return lacking and hub_reachable()


def hub_reachable() -> bool:
    """Whether a Hugging Face hub (HF_ENDPOINT, through the environment's proxy) answers within HUB_TIMEOUT_S."""
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    from minitron_train.fetch.hub import hub_endpoint

    try:
        get_session().head(hub_endpoint(), timeout=HUB_TIMEOUT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled):
        return False
    return True


def check_columns(task: str, files: dict[str, Path]) -> None:
    """Reject a file that lacks a column which the task's prompts read."""
    spec = spec_of(task)
    for path in files.values():
        columns = read_columns(path)
        missing = [column for column in (spec.columns if spec else ()) if column not in columns]
        if missing:
            raise UserError(
                f"{path}: column {missing[0]!r} is missing, which lm-eval's task {task} reads; "
                f"rename one of {', '.join(sorted(columns))}, or remove the file"
            )


def read_columns(path: Path) -> set[str]:
    """Return the column names of a file without reading all rows."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with parquet_errors(path):
            return set(pq.read_schema(path).names)
    return set(next(iter(read_jsonl(path)), {}))


def read_jsonl(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield ROW.decode(line)
                except (msgspec.MsgspecError, RecursionError) as error:
                    reason = f"line {number} is not a JSON object ({first_line(error)})"
                    raise UserError(f"{path}: {reason}; copy the file again") from error
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}); copy the file again") from error


@contextlib.contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn pyarrow's read errors into a UserError."""
    import pyarrow as pa

    try:
        yield
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file, or damaged ({first_line(error)}); copy it again") from error


def read_splits(*, files: dict[str, str], task: str = "", **_: Any) -> dict[str, Any]:
    """Return split -> datasets.Dataset in memory. lm-eval calls this as a task's custom_dataset instead of the hub.

    Raises:
        UserError: a file is damaged or empty, or a column has a type that the task does not expect.
    """
    import pyarrow as pa
    from datasets import Dataset

    found = {}
    for split, name in files.items():
        path = Path(name)
        rows = read_rows(path, task)
        try:
            found[split] = Dataset.from_list(rows)
        except (pa.ArrowException, TypeError) as error:
            reason = f"a column has values of several types ({first_line(error)})"
            raise UserError(f"{path}: {reason}; convert them to one type, or remove the column") from error
    return found


def read_rows(path: Path, task: str) -> list[dict[str, Any]]:
    """Read all rows of one file.

    Raises:
        UserError: the file has no rows, or a row does not match the task.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with parquet_errors(path):
            rows = pq.read_table(path).to_pylist()
    else:
        rows = list(read_jsonl(path))
    if not rows:
        raise UserError(f"{path}: has no rows; copy the file again")
    spec = spec_of(task)
    kind = msgspec.defstruct("Row", spec.columns.items() if spec else ())
    for number, row in enumerate(rows, start=1):
        try:
            msgspec.convert(row, kind)
        except msgspec.ValidationError as error:
            raise UserError(
                f"{path}: row {number} does not match the columns of {task} ({error}); correct the file"
            ) from None
    return rows
