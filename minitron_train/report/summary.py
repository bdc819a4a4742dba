"""The evaluation as rows, and the plain-text table that `run` prints at its end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.report import numbers
from minitron_train.report.load import Run, load_run

PREFERRED = (
    "acc_norm",
    "acc",
    "exact_match",
    "pass@1",
    "rougeL",
    "mc2",
)  # the headline metric of a task: the first it has
SHARES = frozenset({"acc_norm", "acc", "exact_match", "pass@1", "mc2"})  # between 0 and 1, printed as percent
TASK_NAMES = {
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "winogrande": "WinoGrande",
    "arc_challenge": "ARC-C",
    "arc_easy": "ARC-E",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
    "truthfulqa_mc2": "TruthfulQA",
    "wikitext": "WikiText",
    "xlsum": "XLSum",
}
CHANCE = {"hellaswag": 0.25, "mmlu": 0.25, "arc_challenge": 0.25, "arc_easy": 0.25, "winogrande": 0.5}  # of guessing


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One model on one task; `value` is None when it was not run, and `reason` says why."""

    metric: str
    value: float | None = None
    stderr: float | None = None
    rows: int | None = None
    num_fewshot: int | None = None
    reason: str = ""

    @property
    def text(self) -> str:
        """ "43.0 ± 4.9 %", "0.213 ± 0.010" or "not run"."""
        if self.value is None:
            return "not run"
        if self.metric not in SHARES:
            return f"{self.value:.3f}" + (f" ± {self.stderr:.3f}" if self.stderr is not None else "")
        error = f" ± {self.stderr * 100:.1f}" if self.stderr is not None else ""
        return f"{self.value * 100:.1f}{error} %"


def task_name(task: str) -> str:
    """As the papers write it."""
    return TASK_NAMES.get(task, task)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


def tasks_of(run: Run) -> list[str]:
    """Every task that any model was evaluated on, or should have been; in the order of the first file."""
    return list(dict.fromkeys(task for label in run.labels for task in results_of(run, label)))


def results_of(run: Run, label: str) -> Mapping[str, Any]:
    """The `results` of one model; empty when it was not evaluated."""
    results = run.evals.get(label, {}).get("results")
    return results if isinstance(results, Mapping) else {}


def metric_of(run: Run, task: str) -> str:
    """The task's headline metric: the same for every model."""
    found = {name for label in run.labels for name in entry_of(run, label, task)}
    return next((metric for metric in PREFERRED if metric in found), "acc")


def entry_of(run: Run, label: str, task: str) -> Mapping[str, Any]:
    """One entry of `results`; empty when absent."""
    entry = results_of(run, label).get(task)
    return entry if isinstance(entry, Mapping) else {}


def score_of(run: Run, label: str, task: str, metric: str | None = None) -> Score:
    """One model's score on one task."""
    metric = metric or metric_of(run, task)
    entry = entry_of(run, label, task)
    if (value := number(entry.get(metric))) is None:
        reason = str(entry.get("not_run") or "")
        return Score(metric=metric, reason=reason or ("" if label in run.evals else f"the {label} was not evaluated"))
    stderr, rows, shots = (number(entry.get(key)) for key in (f"{metric}_stderr", "rows", "num_fewshot"))
    return Score(
        metric=metric,
        value=value,
        stderr=stderr,
        rows=None if rows is None else int(rows),
        num_fewshot=None if shots is None else int(shots),
    )


def perplexity_of(run: Run, label: str) -> float | None:
    """Perplexity of one model on the held-out slice; None when it was not measured."""
    value = run.evals.get(label, {}).get("perplexity")
    return float(value) if isinstance(value, int | float) else None


def not_run(run: Run) -> list[str]:
    """ "MMLU: no data …", once for all models that share the reason."""
    reasons: dict[str, list[str]] = {}
    for task in tasks_of(run):
        for label in run.labels:
            score = score_of(run, label, task)
            if score.value is None and score.reason:
                reasons.setdefault(f"{task_name(task)}: not run: {score.reason}", []).append(label)
    return list(reasons)


def summary_table(output_dir: Path) -> str:
    """Parameters, bytes, perplexity and every task of teacher, pruned and student, as aligned text.

    What was not run says so; the reasons follow under the table.

    Raises:
        UserError: there is no such folder.
    """
    run = load_run(output_dir)
    tasks = tasks_of(run)
    head = ["", "parameters", "bytes", "perplexity"]
    for task in tasks:
        rows = sorted({score.rows for label in run.labels if (score := score_of(run, label, task)).rows is not None})
        many = f", {rows[0]:,} rows" if len(rows) == 1 else ""
        head.append(f"{task_name(task)} {metric_of(run, task)}{many}")
    table = [head]
    for label in run.labels:
        model = run.models.get(label)
        table.append(
            [
                label,
                numbers.count(model.parameters) if model else "–",
                numbers.byte_size(model.weight_bytes) if model else "–",
                numbers.perplexity(perplexity_of(run, label)),
                *(score_of(run, label, task).text for task in tasks),
            ]
        )
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, *not_run(run)])
