"""lm-eval's nested result object -> the flat records that are written to eval/LABEL.json."""

import math
from collections.abc import Iterator, Mapping
from typing import Any


def collect(raw: Mapping[str, Any], leaves: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """One record per requested task; a group's record has its members under `parts`, a tag stands for its tasks.

    Args:
        leaves: requested task, group or tag -> its leaf tasks.
    """
    groups, tasks = raw["group_subtasks"], raw["n-samples"]
    names = (name for asked, found in leaves.items() for name in ([asked] if asked in {*groups, *tasks} else found))
    return {name: record(raw, name) for name in names}


def record(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Metrics with their standard errors, rows, shots and task version, of one task or group.

    A metric that is not a number (an overflown perplexity, the error of one row) is under `not_finite`, as text.
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
    """A nested value for JSON, which has neither NaN nor infinity: null instead."""
    if isinstance(value, Mapping):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def items(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One object per evaluated row: what identifies it, what the model answered, and its metrics."""
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
