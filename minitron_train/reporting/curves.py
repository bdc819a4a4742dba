"""Figures of training: losses, validation, learning rate, gradient norm and throughput over training tokens."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from minitron_train.evaluation.metrics import headline, is_share, number, value_text
from minitron_train.reporting import charts
from minitron_train.reporting.charts import Chart, Key, Mark, Note
from minitron_train.reporting.summary import task_name
from minitron_train.runtime.numbers import percent, perplexity, short, tiny

# T logged steps

SMOOTHING = 20  # the smoothed line averages over 1/20 of the drawn points

Columns = Mapping[str, np.ndarray]
Evals = Mapping[str, Mapping[str, Any]]


def loss_charts(columns: Columns, evals: Evals) -> list[Chart]:
    """Draw the losses and the validation metrics."""
    made = [loss_chart(columns), perplexity_chart(columns, evals), *task_charts(columns, evals)]
    return [chart for chart in made if chart is not None]


def health_charts(columns: Columns) -> list[Chart]:
    """Draw small figures of learning rate, gradient norm and throughput."""
    rows = (
        ("lr", "Learning rate", "Peak {largest}, at the end {last}.", tiny),
        ("grad_norm", "Gradient norm", "Global norm before clipping: median {median}, largest {largest}.", short),
        (
            "tokens_per_second",
            "Tokens per second",
            "Training tokens per second over all ranks: median {median}.",
            short,
        ),
    )
    made = [plain_chart(columns, *row) for row in rows]
    return [chart for chart in made if chart is not None]


def finite_points(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return tokens and values [T] where both are finite; None if there are no such points."""
    if name not in columns or "tokens" not in columns:
        return None
    tokens, values = columns["tokens"], columns[name]
    valid = np.isfinite(tokens) & np.isfinite(values)
    return (tokens[valid], values[valid]) if valid.any() else None


def tokens_scale(columns: Columns) -> charts.Scale:
    """Return a scale from 0 to the last logged token."""
    last = float(np.nanmax(columns["tokens"]))
    scale = charts.linear([0, last], num_ticks=4)
    return charts.Scale(low=0, high=last, ticks=[tick for tick in scale.ticks if tick[0] <= last * 1.001])


def loss_chart(columns: Columns) -> Chart | None:
    """Draw the training loss, raw and smoothed, and the validation loss as dots."""
    series = finite_points(columns, "loss")
    if series is None:
        return None
    x = tokens_scale(columns)
    parts = {name: finite_points(columns, name) for name in ("kd_loss", "ce_loss")}
    distilled = parts["kd_loss"] is not None
    drawn = {"loss": series}
    if distilled and not same(columns["loss"], columns["kd_loss"]):  # the loss has several parts
        drawn |= {name: points for name, points in parts.items() if points is not None}
    validation = finite_points(columns, "eval.validation.kl" if distilled else "eval.validation.loss")
    everything = [value for _, values in (*drawn.values(), *([validation] if validation else [])) for value in values]
    y = charts.auto(everything)
    marks, keys = [], []
    for (name, points), role in zip(drawn.items(), ("student", "pruned", "teacher"), strict=False):
        tokens, values = charts.buckets(*points)
        smooth = charts.smoothed(values, max(1, len(values) // SMOOTHING))
        marks.append(Mark(kind="thin", role=role, path=charts.polyline(x, y, tokens, values), opacity=0.35))
        marks.append(Mark(kind="line", role=role, path=charts.polyline(x, y, tokens, smooth)))
        keys.append(Key(kind="line", role=role, text="training" if name == "loss" else name))
    text = ""
    if validation:
        marks.append(Mark(kind="dots", role="ink", path=charts.dots(x, y, *validation)))
        keys.append(Key(kind="dots", role="ink", text="validation"))
        first, last = validation[1][0], validation[1][-1]
        text = (
            f" Validation changed from {first:.3g} to {last:.3g}."
            if len(validation[1]) > 1
            else f" Validation: {last:.3g}."
        )
    lost = int(np.sum(~np.isfinite(columns["loss"]) & np.isfinite(columns.get("lr", columns["loss"]))))
    text += f" Omitted steps without a finite loss: {lost}." if lost else ""
    kind = "distillation loss" if distilled else "cross-entropy"
    return Chart(
        title="Loss",
        caption=f"{kind.capitalize()} per token (nats) of each step (pale), and its moving mean.{text}",
        x=x,
        y=y,
        marks=marks,
        keys=keys,
        x_label="tokens",
    )


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two columns [T] agree where both were logged."""
    both = np.isfinite(first) & np.isfinite(second)
    return np.allclose(first[both], second[both])


def perplexity_chart(columns: Columns, evals: Evals) -> Chart | None:
    """Draw the validation perplexity, with dashed levels of the other models' evaluations."""
    series = finite_points(columns, "eval.validation.perplexity")
    if series is None:
        return None
    noted = {label: evals[label]["perplexity"] for label in ("teacher", "pruned") if label in evals}
    levels = {label: value for label, value in noted.items() if value is not None}
    values = [*series[1], *levels.values()]
    spread = max((max(values) / min(values)) ** 0.2, 1.01)
    room = [min(values) / spread, max(values) * spread] if levels else []  # space for the names of the levels
    x, y = tokens_scale(columns), charts.auto([*values, *room], ratio=4, zero=False)
    tokens, values = charts.buckets(*series)
    marks = [
        Mark(kind="line", role="student", path=charts.polyline(x, y, tokens, values)),
        Mark(kind="dots", role="student", path=charts.dots(x, y, tokens, values)),
    ]
    notes = []
    for label, value in levels.items():
        marks.append(Mark(kind="dashed", role=label, path=charts.level(x, y, value)))
        notes.append(level_note(y, value, f"{label} {perplexity(value)}", label, above=label != "teacher"))
    dashed = " Dashed: evaluations of the other models." if levels else ""
    return Chart(
        title="Validation perplexity",
        caption=f"Perplexity of the trained model on held-out text; at the end {perplexity(float(series[1][-1]))}.{dashed}",
        x=x,
        y=y,
        marks=marks,
        notes=notes,
        keys=[Key(kind="line", role="student", text="trained model")],
        x_label="tokens",
    )


def level_note(y: charts.Scale, value: float, text: str, role: str, *, above: bool) -> Note:
    """Return a text at the right end of a horizontal level."""
    top = 1 - y.at(value)
    return Note(left=1.0, top=top - 0.08 if above else top + 0.015, text=text, role=role, align="right")


def task_charts(columns: Columns, evals: Evals) -> list[Chart]:
    """Draw one figure per task that was evaluated during training."""
    logged = [name.split(".")[1:] for name in columns if name.startswith("eval.") and name.count(".") == 2]
    made = []
    for task in sorted({task for task, _ in logged}):
        metric = headline(metric for other, metric in logged if other == task)
        series = finite_points(columns, f"eval.{task}.{metric}")
        if series is None or task == "validation":
            continue
        measured = finite_points(columns, f"eval.{task}.{metric}.teacher")  # on the same rows
        known = evals["teacher"]["results"].get(task, {}) if "teacher" in evals else {}
        goal = measured[1][-1] if measured else number(known.get(metric))
        label = partial(percent, digits=0) if is_share(metric) else short
        x, y = tokens_scale(columns), charts.linear([*series[1], *([goal] if goal else [])], label)
        marks = [
            Mark(kind="line", role="student", path=charts.polyline(x, y, *series)),
            Mark(kind="dots", role="student", path=charts.dots(x, y, *series)),
        ]
        notes = []
        if goal:
            marks.append(Mark(kind="dashed", role="teacher", path=charts.level(x, y, goal)))
            notes.append(level_note(y, goal, f"teacher {value_text(metric, goal)}", "teacher", above=True))
        caption = f"{metric} of the student; at the end {value_text(metric, float(series[1][-1]))}."
        title = f"{task_name(task)} during training"
        made.append(Chart(title=title, caption=caption, x=x, y=y, marks=marks, notes=notes, x_label="tokens"))
    return made


def plain_chart(columns: Columns, name: str, title: str, caption: str, label: charts.Label) -> Chart | None:
    """Draw one column over the tokens. `caption` may use {largest}, {last} and {median}."""
    series = finite_points(columns, name)
    if series is None:
        return None
    tokens, values = charts.buckets(*series)
    x, y = tokens_scale(columns), charts.auto(values, label) if name == "grad_norm" else charts.linear(values, label)
    marks = [Mark(kind="line", role="student", path=charts.polyline(x, y, tokens, values))]
    facts = {"largest": series[1].max(), "last": series[1][-1], "median": np.median(series[1])}
    caption = caption.format(**{key: label(float(value)) for key, value in facts.items()})
    return Chart(title=title, caption=caption, x=x, y=y, marks=marks, x_label="tokens", height_px=140)
