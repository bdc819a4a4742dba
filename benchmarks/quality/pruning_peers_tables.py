"""The tables of benchmarks/quality/pruning_peers.py, from its finished lines and from the results of `eval`."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from minitron_train.evaluation.hooks import main_metrics
from minitron_train.evaluation.metrics import Score, read_score

AFTER = ("loss_after", "own_loss_after", "own_kl_after")  # fields of a distilled line

Line = dict[str, Any]  # one line of results.jsonl


def table(lines: list[Line], cases: Iterable[str], tokens: int) -> list[Line]:
    """One row per case and target: runs of a case averaged, distilled for `tokens` or not at all."""
    rows = []
    for target, case in product(dict.fromkeys(line["target"] for line in lines), cases):
        own = [line for line in lines if line.get("case") == case and line["target"] == target]
        cuts = [line for line in own if not line["tokens"]]
        after = [line for line in own if line["tokens"] == tokens]
        if not cuts:
            continue
        row = cuts[0] | {"loss": mean(line["loss"] for line in cuts), "tokens": tokens if tokens and after else 0}
        if row["tokens"]:
            row |= {key: mean(line[key] for line in after) for key in AFTER}
        rows.append(row)
    return [{key: value for key, value in row.items() if key != "run"} for row in rows]


def show(teacher_loss: float, rows: list[Line]) -> None:
    print(f"{'':18}{'target':12}{'parameters':>12}{'loss':>9}{'tokens':>9}{'loss':>9}{'own loss':>9}{'KL':>9}")
    print(f"{'teacher':18}{'':24}{teacher_loss:9.4f}")
    for row in rows:
        after = f"{row['tokens']:9,}" + "".join(f"{row[key]:9.4f}" for key in AFTER) if row["tokens"] else ""
        noted = {key: row[key] for key in ("layers", "different") if key in row}
        notes = "".join(f"  {key} {value}" for key, value in noted.items())
        print(f"{row['case']:18}{row['target']:12}{row['parameters']:12,}{row['loss']:9.4f}{after}{notes}")


def show_tasks(rows: list[Line]) -> None:
    """Print the table of --tasks; ± is one standard error."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("model", "own_loss")))
    widths = [max(22, len(name) + 2) for name in names]
    print("".join([f"{'':36}{'own loss':>9}", *map(str.rjust, names, widths)]))
    for row in rows:
        loss = "–" if row["own_loss"] is None else f"{row['own_loss']:.4f}"
        cells = [task_cell(name, *row.get(name, (None, None))) for name in names]
        print("".join([f"{row['model']:36}{loss:>9}", *map(str.rjust, cells, widths)]))


def task_cell(name: str, value: float | None, stderr: float | None) -> str:
    """One figure of `TASK.METRIC` in the report's format."""
    return Score(metric=name.rpartition(".")[2], value=value, stderr=stderr).text


def task_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Nats on held-out text, and [value, standard error] of each task's headline metric, from a file that `eval` wrote.

    A missing figure is None: a perplexity that is not a number, or a standard error that a task does not have.
    """
    perplexity = report["perplexity"]
    figures: dict[str, Any] = {"own_loss": None if perplexity is None else math.log(perplexity)}
    for name in main_metrics(report["results"]):
        task, _, metric = name.rpartition(".")
        score = read_score(report["results"][task], metric)
        figures[name] = [score.value, score.stderr]
    return figures


def write(file: Path | None, report: Mapping[str, Any]) -> None:
    """Write all figures so far."""
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n")
