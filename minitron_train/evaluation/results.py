"""lm-eval's nested result object -> the flat records that are written to eval/LABEL.json."""

from collections.abc import Mapping
from typing import Any


def collect(raw: Mapping[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """One record per requested task; a group's record has its members under `parts`."""
    return {name: record(raw, name) for name in names}


def record(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Metrics with their standard errors, rows, shots and task version, of one task or group."""
    metrics: dict[str, Any] = {}
    for key, value in raw["results"].get(name, {}).items():
        metric, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float):
            metrics[metric if filter_name == "none" else f"{metric},{filter_name}"] = value
    members = [record(raw, child) | {"task": child} for child in raw["group_subtasks"].get(name, [])]
    rows = sum(member["rows"] for member in members) if members else raw["n-samples"][name]["effective"]
    shots = members[0]["num_fewshot"] if members else raw["n-shot"][name]
    result = metrics | {"rows": rows, "num_fewshot": shots, "version": raw["versions"].get(name)}
    if members:
        result["parts"] = {member.pop("task"): member for member in members}
    return result
