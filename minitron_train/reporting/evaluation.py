"""Tables and figures of the report's evaluation section."""

from collections.abc import Iterable, Mapping
from typing import Any

from minitron_train.evaluation.metrics import is_share, metric_text, ratio_text, read_score
from minitron_train.reporting import charts
from minitron_train.reporting.charts import Chart, Mark
from minitron_train.reporting.load import MODELS, Run
from minitron_train.reporting.summary import entry_of, metric_of, perplexity_of, score_of, task_name, tasks_of
from minitron_train.runtime.numbers import percent, perplexity

CHANCE = {
    "hellaswag": 0.25,
    "mmlu": 0.25,
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "winogrande": 0.5,
}  # accuracy of guessing
ROW_PX = 34  # height of one model's row in a figure


def evaluation_rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per task, perplexity first: each model's score, rows, shots, and the ratio to the teacher."""
    tasks = [task_row(run, task) for task in tasks_of(run)]
    values = {label: perplexity_of(run, label) for label in run.labels}
    if all(value is None for value in values.values()):
        return tasks
    teacher, student = values.get("teacher"), values.get("student")
    first = {
        "task": "Perplexity",
        "metric": "lower is better",
        "cells": [perplexity(value) for value in values.values()],
        "rows": "–",
        "shots": "–",
        "share": ratio_text("perplexity", student, teacher),
    }
    return [first, *tasks]


def task_row(run: Run, task: str) -> dict[str, Any]:
    """Return the table row of one task."""
    metric = metric_of(run, task)
    scores = {label: score_of(run, label, task, metric) for label in run.labels}
    teacher, student = (scores[label].value if label in scores else None for label in ("teacher", "student"))
    return {
        "task": task_name(task),
        "metric": ", ".join(
            filter(None, (metric_text(metric), f"chance {percent(CHANCE[task], 0)}" if task in CHANCE else ""))
        ),
        "cells": [score.text for score in scores.values()],
        "rows": counts(score.rows for score in scores.values()),
        "shots": counts(score.num_fewshot for score in scores.values()),
        "share": ratio_text(metric, student, teacher),
    }


def counts(values: Iterable[int | None]) -> str:
    """Format the distinct numbers among `values`; a single one if all models had the same."""
    return ", ".join(f"{value:,}" for value in sorted({value for value in values if value is not None})) or "–"


def part_tables(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each task group, such as MMLU's categories and subjects: one per part, with its depth."""
    tables = {
        task_name(task): part_rows({label: entry_of(run, label, task) for label in run.labels}, metric_of(run, task))
        for task in tasks_of(run)
    }
    return {name: rows for name, rows in tables.items() if rows}


def part_rows(entries: Mapping[str, Mapping[str, Any]], metric: str, depth: int = 0) -> list[dict[str, Any]]:
    """Return the rows of one group, each followed by those of its own parts; empty for a single task."""
    rows = []
    for name in dict.fromkeys(name for entry in entries.values() for name in entry.get("parts", {})):
        below = {label: entry.get("parts", {}).get(name, {}) for label, entry in entries.items()}
        scores = [read_score(entry, metric) for entry in below.values()]
        row = {"part": name.replace("_", " "), "depth": depth, "cells": [score.text for score in scores]}
        rows += [row | {"rows": counts(score.rows for score in scores)}, *part_rows(below, metric, depth + 1)]
    return rows


def score_charts(run: Run) -> list[Chart]:
    """Draw a figure for each task whose metric is a fraction."""
    made = []
    for task in tasks_of(run):
        metric = metric_of(run, task)
        scores = {label: score_of(run, label, task, metric) for label in run.labels}
        measured = {
            label: (score.value, score.stderr or 0.0) for label, score in scores.items() if score.value is not None
        }
        if measured and is_share(metric):
            made.append(score_chart(task, metric, measured))
    return made


def score_chart(task: str, metric: str, measured: Mapping[str, tuple[float, float]]) -> Chart:
    """Draw each model's score with a bar of ± one standard error, and the level of guessing.

    Args:
        measured: label -> (value, standard error).
    """
    chance = [CHANCE[task]] if task in CHANCE else []
    bounds = [value + sign * error for value, error in measured.values() for sign in (-1, 1)]
    x = charts.linear([*bounds, *chance], label=lambda share: percent(share, 0), zero=False)
    y = charts.Scale(low=len(measured), high=0, ticks=[(i + 0.5, label) for i, label in enumerate(measured)])
    marks = [
        Mark(kind="dashed", role="muted", path=f"M{charts.point(x, y, value, 0)}V{charts.VIEW}") for value in chance
    ]
    for i, (label, (value, error)) in enumerate(measured.items()):
        role, title = label if label in MODELS else "ink", f"{label}: {percent(value)} ± {percent(error)}"
        whisker = charts.polyline(x, y, [value - error, value + error], [i + 0.5, i + 0.5])
        marks.append(Mark(kind="line", role=role, path=whisker, title=title))
        marks.append(Mark(kind="dots", role=role, path=charts.dots(x, y, [value], [i + 0.5]), title=title))
    guessing = "; dashed: guessing." if chance else "."
    return Chart(
        title=task_name(task),
        caption=f"Dots: {metric_text(metric)}; bars: ± one standard error{guessing}",
        x=x,
        y=y,
        marks=marks,
        height_px=ROW_PX * len(measured) + 12,
    )
