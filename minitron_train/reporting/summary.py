"""Look-ups in the evaluations of a run, and the plain-text table that `run` prints at its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_train.evaluation.metrics import Score, headline, metric_text, metrics_in, number, read_score
from minitron_train.reporting.load import Run, load_run
from minitron_train.reporting.speed import conditions, speed_table
from minitron_train.runtime import numbers
from minitron_train.runtime.files import byte_size
from minitron_train.stages.layout import STUDENT

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


def task_name(task: str) -> str:
    """Return a task's name as the papers write it."""
    return TASK_NAMES.get(task, task)


def tasks_of(run: Run) -> list[str]:
    """Return all tasks that were requested for any model; tasks that ran come first."""
    ran = [task for label in run.labels for task in results_of(run, label)]
    return list(dict.fromkeys([*ran, *(task for label in run.labels for task in reasons_of(run, label))]))


def reasons_of(run: Run, label: str) -> Mapping[str, Any]:
    """Return task -> reason, for the tasks of one model that were not run."""
    return run.evals[label].get("not_run", {}) if label in run.evals else {}


def results_of(run: Run, label: str) -> Mapping[str, Any]:
    """Return the `results` of one model; empty if it was not evaluated."""
    return run.evals[label]["results"] if label in run.evals else {}


def metric_of(run: Run, task: str) -> str:
    """Return a task's headline metric, the same for every model; empty if the task was not run."""
    return headline(name for label in run.labels for name in metrics_in(entry_of(run, label, task)))


def entry_of(run: Run, label: str, task: str) -> Mapping[str, Any]:
    """Return one entry of `results`; empty if absent."""
    return results_of(run, label).get(task, {})


def score_of(run: Run, label: str, task: str, metric: str | None = None) -> Score:
    """Return one model's score on one task."""
    metric = metric or metric_of(run, task)
    if label not in run.evals:
        return Score(metric=metric, reason=f"the {label} was not evaluated")
    return read_score(entry_of(run, label, task), metric, str(reasons_of(run, label).get(task, "")))


def perplexity_of(run: Run, label: str) -> float | None:
    """Return the perplexity of one model on held-out text; None if it was not measured."""
    return number(run.evals[label]["perplexity"]) if label in run.evals else None


def not_run(run: Run) -> list[str]:
    """Return lines such as "MMLU was not run: no data …", once for all evaluated models with the same reason."""
    evaluated = [label for label in run.labels if label in run.evals]
    scores = {task: [score_of(run, label, task) for label in evaluated] for task in tasks_of(run)}
    lines = (
        f"{task_name(task)} was not run: {score.reason}"
        for task, found in scores.items()
        for score in found
        if score.value is None and score.reason
    )
    return list(dict.fromkeys(lines))


def notes(run: Run) -> list[str]:
    """Return the notes under the scores: substituted splits, and tasks that were not run."""
    return [*substitutions(run), *not_run(run)]


def substitutions(run: Run) -> list[str]:
    """Return lines such as "ARC-C: rows from the validation split (lm-eval uses test)", once for all models that share it."""
    lines = []
    for label in run.labels:
        for task, data in (run.evals[label].get("data", {}) if label in run.evals else {}).items():
            used, usual = data.get("splits", {}), data.get("lm_eval_splits", {})
            shots = entry_of(run, label, task).get("num_fewshot")
            changed = [
                f"{what} from the {used.get(what)} split (lm-eval uses {usual.get(what)})"
                for what in ("rows", "examples" if shots != 0 else "")
                if used.get(what) != usual.get(what)
            ]
            lines += [f"{task_name(task)}: {', '.join(changed)}"] if changed else []
    return list(dict.fromkeys(lines))


def section_of(run: Run, section: str) -> Mapping[str, Any]:
    """Return a section of the newest configuration that a stage recorded."""
    found = (stage["config"].get(section) for stage in reversed(run.stages))
    return next((section for section in found if section), {})


def facts_of(run: Run, stage: str) -> Mapping[str, Any]:
    """Return the facts in a stage's provenance; empty if it has not run."""
    record = run.stage(stage)
    return record.get("facts", {}) if record else {}


def teacher_name(run: Run) -> str | None:
    """Return the teacher's name at its source (folder, hub repository, GGUF file or wheel); None without a source."""
    settings, facts = section_of(run, "teacher"), facts_of(run, "fetch teacher")
    folder = folder_name(settings["path"]) if settings.get("path") else None
    names = (folder, settings.get("repo_id"), facts.get("gguf"), settings.get("wheel"))
    return next((str(name) for name in names if name), None)


def source_name(run: Run) -> str | None:
    """Return the name of the model that was pruned, if it is not the teacher."""
    path = section_of(run, "student").get("pruned_from")
    return folder_name(path) if path else None


def folder_name(path: str) -> str:
    """Return a model folder's name; of the student of another output folder the name of that folder."""
    return Path(path).parent.name if Path(path).name == STUDENT else Path(path).name


def size_of(run: Run, label: str) -> tuple[int | None, int | None]:
    """Return a model's parameters and bytes of weights, from its folder or else from its evaluation."""
    if label in run.models:
        return run.models[label].parameters, run.models[label].weight_bytes
    return (run.evals[label].get("parameters"), run.evals[label].get("bytes")) if label in run.evals else (None, None)


def summary_table(output_dir: Path) -> str:
    """Format parameters, bytes, perplexity and task scores of teacher, pruned and student as an aligned table.

    Lines under the table give the reasons why tasks were not run. A second table follows if speed was measured.

    Raises:
        UserError: the folder does not exist, or a file in it is damaged.
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
    timed = ["", *aligned(speed_table(run)), conditions(run)] if run.speed else []
    return "\n".join([*lines, *notes(run), *timed])


def rows_text(run: Run, task: str) -> str:
    """Return a text such as "100 rows"; empty if the models had different numbers of rows, or none."""
    rows = {score.rows for label in run.labels if (score := score_of(run, label, task)).rows is not None}
    return f"{rows.pop():,} rows" if len(rows) == 1 else ""


def aligned(table: list[list[str]]) -> list[str]:
    """Format a table with the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    cells = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in table
    ]
    return ["  ".join(row).rstrip() for row in cells]
