"""The records of eval/LABEL.json and LABEL.items.jsonl, made from lm-eval's nested results."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from minitron_train.runtime.errors import UserError
from minitron_train.runtime.records import Count, Real, read_whole_record


class Entry(TypedDict, total=False):
    """The record of one task or group. Its metrics are further keys under their own names."""

    rows: Count
    num_fewshot: Count | None
    not_finite: dict[str, str]
    parts: dict[str, "Entry"]


class Splits(TypedDict, total=False):
    """The splits of a task's rows and few-shot examples."""

    rows: str
    examples: str


class TaskData(TypedDict, total=False):
    """The source of a task's data."""

    splits: Splits
    lm_eval_splits: Splits


class Evaluation(TypedDict, total=False):
    """The keys of eval/LABEL.json that the program reads."""

    perplexity: Required[Annotated[float, Meta(gt=0)] | None]
    results: Required[dict[str, Entry]]
    not_run: dict[str, str]  # task -> reason
    data: dict[str, TaskData]
    parameters: Count
    bytes: Count


class Item(TypedDict):
    """The keys of a line of eval/LABEL.items.jsonl that the program reads. A row's metric may have any type."""

    task: str
    filter: str
    doc_id: int
    prompt_hash: str
    metrics: dict[str, Real | bool | str | list[Any] | dict[str, Any] | None]


def read_evaluation(file: Path) -> Evaluation:
    """Read one eval/LABEL.json.

    Raises:
        UserError: the file is missing, damaged, or from another program.
    """
    again = f"evaluate {file.stem} again with force=true"
    try:
        return read_whole_record(file, Evaluation, f"{again}, or remove the file from {file.parent}")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {again}") from None


def collect(raw: Mapping[str, Any], leaves: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Return one record per requested task. A group's record has its members under `parts`; a tag is replaced by its tasks.

    Args:
        leaves: requested task, group or tag -> its leaf tasks.
    """
    groups, tasks = raw["group_subtasks"], raw["n-samples"]
    names = (name for asked, found in leaves.items() for name in ([asked] if asked in {*groups, *tasks} else found))
    return {name: record(raw, name) for name in names}


def record(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return metrics, standard errors, rows, shots and task version of one task or group.

    `not_finite` holds metrics that are not finite, as text: an overflowed perplexity, the standard error of one row.
    """
    metrics: dict[str, Any] = {}
    not_finite: dict[str, str] = {}
    for key, value in raw["results"].get(name, {}).items():
        metric, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float):
            label = metric if filter_name == "none" else f"{metric},{filter_name}"
            if math.isfinite(value):
                metrics[label] = value
            else:
                not_finite[label] = str(value)
    members = {child: record(raw, child) for child in raw["group_subtasks"].get(name, [])}
    rows = sum(member["rows"] for member in members.values()) if members else raw["n-samples"][name]["effective"]
    shots = next(iter(members.values()))["num_fewshot"] if members else raw["n-shot"][name]
    result = metrics | {"rows": rows, "num_fewshot": shots, "version": raw["versions"].get(name)}
    result |= {"not_finite": not_finite} if not_finite else {}
    return result | ({"parts": members} if members else {})


def without_infinities(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold, by None in a nested value."""
    if isinstance(value, Mapping):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def items(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one object per evaluated row: its identity, the model's answers, and its metrics."""
    for task, samples in sorted(raw["samples"].items()):
        for sample in samples:
            yield {
                "task": task,
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "prompt_hash": sample["prompt_hash"],
                "filter": sample["filter"],
                "target": sample["target"],
                "answers": sample["filtered_resps"],
                "metrics": {metric: sample[metric] for metric in sample["metrics"]},
            }
