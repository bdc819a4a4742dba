"""Compare evaluated models row by row: differences, their standard errors, and a paired test."""

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from minitron_train.evaluation.results import Item
from minitron_train.evaluation.task_names import mmlu_subjects
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.records import read_lines

ITEM = msgspec.json.Decoder(Item)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one task for two models, on the same rows."""

    task: str
    metric: str
    rows: int
    first: float
    second: float
    stderr: float  # standard error of second - first over the paired rows
    p_value: float  # probability of a difference at least this large by chance

    @property
    def difference(self) -> float:
        return self.second - self.first


def read_items(folder: Path, label: str) -> dict[tuple[str, str, int, str], dict[str, float]]:
    """Return the metrics of each row of folder/LABEL.items.jsonl, by task, filter, row and hash of the prompt.

    Raises:
        UserError: the file does not exist, or one of its lines is damaged.
    """
    path = folder / f"{label}.items.jsonl"
    try:
        lines = read_lines(path, ITEM.decode)
    except FileNotFoundError:
        labels = sorted(file.name.removesuffix(".items.jsonl") for file in folder.glob("*.items.jsonl"))
        found = ", ".join(labels) or "none"
        raise UserError(
            f"eval.compare: {path} does not exist (evaluated labels: {found}); choose another label, or evaluate this one"
        ) from None
    wrong = lines.damaged | ({len(lines.values) + 1: "cut off"} if lines.cut_off else {})
    for number, why in wrong.items():
        raise UserError(
            f"eval.compare: {path}: line {number} is not an evaluated row ({why}); evaluate {label} again with force=true"
        )
    return {
        (item["task"], item["filter"], item["doc_id"], item["prompt_hash"]): numbers_of(item) for item in lines.values
    }


def numbers_of(item: Item) -> dict[str, float]:
    """Return the numeric metrics of a row; a boolean becomes 1 or 0."""
    return {name: float(value) for name, value in item["metrics"].items() if isinstance(value, int | float)}


def compare(folder: Path, first: str, second: str) -> list[Comparison]:
    """Compare two labels on each task that both have, using the rows and prompts they share. MMLU's subjects are pooled."""
    ours, theirs = read_items(folder, first), read_items(folder, second)
    subjects = mmlu_subjects()
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    shared = ours.keys() & theirs.keys()
    for key in shared:
        task, filter_name, *_ = key
        name = "mmlu" if task in subjects else task
        for metric in ours[key].keys() & theirs[key].keys():
            full = metric if filter_name == "none" else f"{metric},{filter_name}"
            pairs.setdefault((name, full), []).append((ours[key][metric], theirs[key][metric]))
    if not shared:
        raise UserError(
            f"eval.compare: {first} and {second} share no evaluated row; evaluate both with the same eval.* settings"
        )
    if not pairs:
        tasks = ", ".join(sorted({task for task, *_ in shared}))
        raise UserError(
            f"eval.compare: {first} and {second} share only rows of {tasks}, which have no numeric metric per row; "
            f"compare {first}.json and {second}.json in {folder}, or evaluate another task"
        )
    return [paired(task, metric, values) for (task, metric), values in sorted(pairs.items())]


def paired(task: str, metric: str, values: list[tuple[float, float]]) -> Comparison:
    """Compute the mean difference, its standard error, and a p-value.

    The p-value is from the exact McNemar test if all values are 0 or 1, otherwise from a paired z-test.
    """
    differences = [b - a for a, b in values]
    count = len(values)
    mean = math.fsum(differences) / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / max(1, count - 1)
    stderr = math.sqrt(variance / count)
    if all(x in (0, 1) for pair in values for x in pair):
        p_value = mcnemar(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
    elif stderr:
        p_value = math.erfc(abs(mean) / stderr / math.sqrt(2))
    else:  # the difference is the same in every row; a single row has no variance
        p_value = 0.0 if mean and count > 1 else 1.0
    first, second = (math.fsum(column) / count for column in zip(*values, strict=True))
    return Comparison(task, metric, count, first, second, stderr, p_value)


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value. Under the null hypothesis a changed row is equally often gained and lost."""
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def compare_table(folder: Path, labels: list[str]) -> str:
    """Compare the first label with each other one: a table with a line per task and metric."""
    head = f"{'task':24} {'metric':18} {'rows':>6} {'first':>8} {'second':>8} {'diff':>8} {'±':>7} {'p':>7}"
    lines = []
    for label in labels[1:]:
        lines += [f"{labels[0]} -> {label}", head]
        lines += [format_row(row) for row in compare(folder, labels[0], label)]
    return "\n".join(lines)


def format_row(row: Comparison) -> str:
    return (
        f"{row.task:24} {row.metric:18} {row.rows:6} {row.first:8.4f} {row.second:8.4f} "
        f"{row.difference:+8.4f} {row.stderr:7.4f} {row.p_value:7.4f}"
    )
