"""Evaluation data on this disk: which file serves which lm-eval task, the check of its columns, what is still missing.

    DATA_DIR/FOLDER/SPLIT.parquet | .jsonl | .jsonl.gz

FOLDER is the task's name, or what TASKS says; SPLIT is train, dev, validation or test.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.errors import UserError
from minitron_train.evaluation.task_names import mmlu_subjects

NO_HUB = "no Hugging Face hub in reach"  # ends the reason of a task that was not run for want of data
HUB_TIMEOUT_S = 3.0
SPLITS = ("train", "dev", "validation", "test")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Local:
    """Where a task's files lie, and the columns that its prompts read (jinja would take a missing one for empty)."""

    columns: tuple[str, ...]
    folder: str | None = None


TASKS = {
    "hellaswag": Local(("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "mmlu": Local(("question", "choices", "answer")),
    "arc_easy": Local(("question", "choices", "answerKey")),
    "arc_challenge": Local(("question", "choices", "answerKey")),
    "winogrande": Local(("sentence", "option1", "option2", "answer")),
    "gsm8k": Local(("question", "answer")),
    "humaneval": Local(("prompt", "test", "entry_point")),
    "mbpp": Local(("text", "code", "test_list")),
    "truthfulqa_mc1": Local(("question", "mc1_targets"), "truthfulqa"),
    "truthfulqa_mc2": Local(("question", "mc2_targets"), "truthfulqa"),
    "xlsum_english": Local(("text", "summary"), "xlsum"),
    "wikitext": Local(("page",)),
}


def local_files(task: str, data_dir: Path) -> dict[str, Path]:
    """Split -> file of one lm-eval task; empty when there is none. MMLU's subjects lie in mmlu/SUBJECT."""
    subject = task.removeprefix("mmlu_") if task in mmlu_subjects() else task
    named = TASKS[task].folder if task in TASKS else None
    folder = data_dir / (named or (task if subject == task else f"mmlu/{subject}"))
    found = {}
    for split in SPLITS:
        existing = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
        if existing:
            found[split] = existing[0]
    return found


def listing(data_dir: Path) -> str:
    """A hash of the names and sizes of all files: changes when data come or go."""
    files = sorted(path for path in data_dir.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(data_dir)} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def can_be_completed(facts: Mapping[str, Any]) -> bool:
    """Whether an evaluation (its record) had to leave out tasks for want of a hub that is in reach now."""
    lacking = any(reason.endswith(NO_HUB) for reason in facts.get("not_run", {}).values())
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
    """Refuse a file without a column that the task's prompts read."""
    spec = TASKS.get("mmlu" if task in mmlu_subjects() else task)
    for path in files.values():
        columns = read_columns(path)
        missing = [column for column in (spec.columns if spec else ()) if column not in columns]
        if missing:
            raise UserError(
                f"{path}: column {missing[0]!r} is missing, which lm-eval's task {task} reads; "
                f"rename one of {', '.join(sorted(columns))}, or take the file out"
            )


def read_columns(path: Path) -> set[str]:
    """Column names of a file, without reading its rows."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return set(pq.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a parquet file ({error}); copy it again") from error
    return set(next(iter(read_jsonl(path)), {}))


def read_jsonl(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSON-lines file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}: line {number} is not JSON ({error}); copy the file again") from error
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}); copy the file again") from error


def read_splits(*, files: dict[str, str], **_: Any) -> dict[str, Any]:
    """What lm-eval calls in place of the hub (custom_dataset of a task): split -> datasets.Dataset in memory."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = {}
    for split, name in files.items():
        path = Path(name)
        rows[split] = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else list(read_jsonl(path))
        if not rows[split]:
            raise UserError(f"{path}: holds no rows; copy the file again")
    return {split: Dataset.from_list(part) for split, part in rows.items()}
