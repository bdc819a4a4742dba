"""The evaluation as rows, and the plain-text table that `run` prints at its end."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.files import byte_size
from minitron_train.report import numbers
from minitron_train.report.load import Run, load_run

PREFERRED = (  # a task's headline metric is the first of these that it has, else its own first; filters follow the comma
    "acc_norm",
    "acc",
    "exact_match",
    "exact_match,flexible-extract",
    "exact_match,strict-match",
    "pass@1",
    "pass_at_1",
    "pass_at_1,create_test",
    "rougeL",
    "word_perplexity",
)
UNBOUNDED = {"perplexity", "loss", "bits", "likelihood", "bleu", "chrf", "ter"}  # words of metrics that are no share
NO_METRICS = ("rows", "num_fewshot", "version")  # the other numbers of a record
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
    "xlsum_english": "XLSum",
}


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
        if self.stderr is None:
            return value_text(self.metric, self.value)
        if is_share(self.metric):
            return f"{self.value * 100:.1f} ± {self.stderr * 100:.1f} %"
        return f"{self.value:.3f} ± {self.stderr:.3f}"


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is printed as percent."""
    return UNBOUNDED.isdisjoint(metric_text(metric).split("_"))


def value_text(metric: str, value: float) -> str:
    """ "43.0 %", or "42.100" where the metric is no share."""
    return numbers.percent(value) if is_share(metric) else f"{value:.3f}"


def ratio_text(metric: str, value: float | None, reference: float | None) -> str:
    """What is kept of a reference: "83.7 %", or "× 1.48" where the metric is no share; "–" where one is missing."""
    if value is None or not reference:
        return "–"
    return numbers.percent(value / reference) if is_share(metric) else f"× {value / reference:.2f}"


def metric_text(metric: str) -> str:
    """Without the name of lm-eval's filter."""
    return metric.partition(",")[0]


def task_name(task: str) -> str:
    """As the papers write it."""
    return TASK_NAMES.get(task, task)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of 400 digits
        return None


def tasks_of(run: Run) -> list[str]:
    """Every task that any model was evaluated on, or should have been; what ran first."""
    ran = [task for label in run.labels for task in results_of(run, label)]
    return list(dict.fromkeys([*ran, *(task for label in run.labels for task in reasons_of(run, label))]))


def reasons_of(run: Run, label: str) -> Mapping[str, Any]:
    """Tasks of one model that were not run, with the reason."""
    return run.evals[label].get("not_run", {}) if label in run.evals else {}


def results_of(run: Run, label: str) -> Mapping[str, Any]:
    """The `results` of one model; empty when it was not evaluated."""
    return run.evals[label]["results"] if label in run.evals else {}


def metric_of(run: Run, task: str) -> str:
    """The task's headline metric, the same for every model; empty when it was not run."""
    return headline(name for label in run.labels for name in metrics_in(entry_of(run, label, task)))


def metrics_in(entry: Mapping[str, Any]) -> list[str]:
    """Names of what one record of `results` measured, in lm-eval's order, without the standard errors."""
    numeric = [name for name, value in entry.items() if number(value) is not None and name not in NO_METRICS]
    return [name for name in numeric if not metric_text(name).endswith("_stderr")]


def headline(metrics: Iterable[str]) -> str:
    """Which metric of a task stands for it; empty when there is none."""
    found = list(metrics)
    return next((metric for metric in (*PREFERRED, *found) if metric in found), "")


def entry_of(run: Run, label: str, task: str) -> Mapping[str, Any]:
    """One entry of `results`; empty when absent."""
    return results_of(run, label).get(task, {})


def score_of(run: Run, label: str, task: str, metric: str | None = None) -> Score:
    """One model's score on one task."""
    metric = metric or metric_of(run, task)
    if label not in run.evals:
        return Score(metric=metric, reason=f"the {label} was not evaluated")
    return read_score(entry_of(run, label, task), metric, str(reasons_of(run, label).get(task, "")))


def read_score(entry: Mapping[str, Any], metric: str, reason: str = "") -> Score:
    """The headline numbers of one record of `results` or of its `parts`."""
    name, comma, filter_name = metric.partition(",")
    rows, shots = number(entry.get("rows")), number(entry.get("num_fewshot"))
    return Score(
        metric=metric,
        value=number(entry.get(metric)),
        stderr=number(entry.get(f"{name}_stderr{comma}{filter_name}")),
        rows=None if rows is None else int(rows),
        num_fewshot=None if shots is None else int(shots),
        reason=reason,
    )


def perplexity_of(run: Run, label: str) -> float | None:
    """Perplexity of one model on the held-out slice; None when it was not measured."""
    return number(run.evals[label]["perplexity"]) if label in run.evals else None


def not_run(run: Run) -> list[str]:
    """ "MMLU: not run: no data …", once for all models that share the reason."""
    scores = {task: [score_of(run, label, task) for label in run.labels] for task in tasks_of(run)}
    lines = (
        f"{task_name(task)}: not run: {score.reason}"
        for task, found in scores.items()
        for score in found
        if score.value is None and score.reason
    )
    return list(dict.fromkeys(lines))


def notes(run: Run) -> list[str]:
    """What stands under the scores: rows and examples that are not lm-eval's own, and tasks that were not run."""
    return [*substitutions(run), *not_run(run)]


def substitutions(run: Run) -> list[str]:
    """ "ARC-C: rows of the validation split (lm-eval's own: test)", once for all models that share it."""
    lines = []
    for label in run.labels:
        for task, data in (run.evals[label].get("data", {}) if label in run.evals else {}).items():
            used, usual = data.get("splits", {}), data.get("lm_eval_splits", {})
            shots = entry_of(run, label, task).get("num_fewshot")
            said = [
                f"{what} of the {used.get(what)} split (lm-eval's own: {usual.get(what)})"
                for what in ("rows", "examples" if shots != 0 else "")
                if used.get(what) != usual.get(what)
            ]
            lines += [f"{task_name(task)}: {', '.join(said)}"] if said else []
    return list(dict.fromkeys(lines))


def section_of(run: Run, section: str) -> Mapping[str, Any]:
    """A section of the newest configuration that a stage of the run recorded."""
    found = (stage["config"].get(section) for stage in reversed(run.stages))
    return next((section for section in found if section), {})


def facts_of(run: Run, stage: str) -> Mapping[str, Any]:
    """What a stage found out; empty when it was not run."""
    record = run.stage(stage)
    return record.get("facts", {}) if record else {}


def teacher_name(run: Run) -> str | None:
    """How the teacher is called where it came from: a folder, a hub's repository, a GGUF file, a wheel; None: nowhere."""
    settings, facts = section_of(run, "teacher"), facts_of(run, "fetch teacher")
    folder = Path(settings["path"]).name if settings.get("path") else None
    names = (folder, settings.get("repo_id"), facts.get("gguf"), settings.get("wheel"))
    return next((str(name) for name in names if name), None)


def size_of(run: Run, label: str) -> tuple[int | None, int | None]:
    """Parameters and bytes of weights: of the folder, or as the evaluation noted them."""
    if label in run.models:
        return run.models[label].parameters, run.models[label].weight_bytes
    return (run.evals[label].get("parameters"), run.evals[label].get("bytes")) if label in run.evals else (None, None)


def summary_table(output_dir: Path) -> str:
    """Parameters, bytes, perplexity and every task of teacher, pruned and student, as aligned text.

    What was not run says so; the reasons follow under the table.

    Raises:
        UserError: there is no such folder.
    """
    run = load_run(output_dir)
    tasks = tasks_of(run)
    table = [
        ["", "", "", "", *(task_name(task) for task in tasks)],
        ["", "", "", "", *(metric_text(metric_of(run, task)) for task in tasks)],
        ["", "parameters", "bytes", "perplexity", *(rows_text(run, task) for task in tasks)],
    ]
    for label in run.labels:
        parameters, weight_bytes = size_of(run, label)
        sizes = [
            "–" if parameters is None else numbers.count(parameters),
            "–" if weight_bytes is None else byte_size(weight_bytes),
            numbers.perplexity(perplexity_of(run, label)),
        ]
        table.append([label, *sizes, *(score_of(run, label, task).text for task in tasks)])
    lines = aligned([row for row in table if any(row)])
    lines.insert(len(lines) - len(run.labels), "-" * len(lines[-1]))
    return "\n".join([*lines, *notes(run)])


def rows_text(run: Run, task: str) -> str:
    """ "100 rows"; nothing when the models saw different numbers of rows, or none."""
    rows = {score.rows for label in run.labels if (score := score_of(run, label, task)).rows is not None}
    return f"{rows.pop():,} rows" if len(rows) == 1 else ""


def aligned(table: list[list[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    cells = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in table
    ]
    return ["  ".join(row).rstrip() for row in cells]
