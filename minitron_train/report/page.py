"""The page's content, section by section, as plain data for the template."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_train.report import charts, numbers
from minitron_train.report.charts import Chart, Mark
from minitron_train.report.load import MODELS, Model, Run
from minitron_train.report.summary import (
    CHANCE,
    SHARES,
    metric_of,
    perplexity_of,
    score_of,
    task_name,
    tasks_of,
)

PARTS = ("embedding", "output", "attention", "mlp", "norms")
SIZES = (
    ("num_layers", "layers"),
    ("hidden_size", "hidden size"),
    ("ffn_hidden_size", "MLP neurons"),
    ("num_attention_heads", "query heads"),
    ("num_query_groups", "KV groups"),
    ("kv_channels", "channels per head"),
    ("vocab_size", "vocabulary"),
)
HASH_DIGITS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One figure of the header: a large value, or one value per model."""

    title: str
    value: str = ""
    detail: str = ""
    rows: list[tuple[str, str]] | None = None  # role (teacher, pruned, student), text


def small_model(run: Run) -> Model | None:
    """The student, or what is there of it: the pruned model."""
    return run.models.get("student") or run.models.get("pruned")


def lede(run: Run) -> str:
    """The whole run in two sentences, of what is known."""
    teacher, student = run.models.get("teacher"), small_model(run)
    if teacher is None:
        return "There is no teacher in this output folder yet."
    said = f"A {teacher.shape.architecture} teacher of {numbers.short(teacher.parameters)} parameters"
    if student is None:
        return f"{said}; nothing has been pruned yet."
    share = student.parameters / teacher.parameters
    said += f" was pruned to {numbers.short(student.parameters)} ({numbers.percent(share)} kept)"
    tokens = run.metrics.get("train", {}).get("tokens")
    said += (
        f" and distilled on {numbers.short(float(tokens[-1]))} tokens."
        if tokens is not None
        else "; not distilled yet."
    )
    found = [(label, perplexity_of(run, label)) for label in MODELS]
    values = ", ".join(f"{label} {numbers.perplexity(value)}" for label, value in found if value is not None)
    return f"{said} Perplexity on held-out text: {values}." if values else said


def tiles(run: Run) -> list[Tile]:
    """The header's figures."""
    made = []
    teacher, student = run.models.get("teacher"), small_model(run)
    if teacher and student:
        change = f"{numbers.short(teacher.parameters)} → {numbers.short(student.parameters)}"
        value = numbers.percent(student.parameters / teacher.parameters)
        made.append(Tile(title="Parameters kept", value=value, detail=change))
    values = [
        (label, numbers.perplexity(perplexity_of(run, label)))
        for label in MODELS
        if perplexity_of(run, label) is not None
    ]
    if values:
        made.append(Tile(title="Perplexity", rows=values))
    for task in tasks_of(run)[:1]:
        scores = [(label, score_of(run, label, task)) for label in MODELS]
        rows = [(label, score.text) for label, score in scores if score.value is not None]
        if rows:
            made.append(Tile(title=f"{task_name(task)}, {metric_of(run, task)}", rows=rows))
    if run.stages:
        total_s = sum(stage.get("wall_seconds") or 0.0 for stage in run.stages)
        peak = max(stage.get("peak_rss_bytes") or 0 for stage in run.stages)
        detail = f"{len(run.stages)} stages, at most {numbers.byte_size(peak)} of memory"
        made.append(Tile(title="Wall time", value=numbers.duration(total_s), detail=detail))
    return made


def size_rows(run: Run) -> list[dict[str, Any]]:
    """Parameters by part, teacher beside student; `width` values are shares of the teacher's largest part."""
    teacher, student = run.models.get("teacher"), small_model(run)
    if teacher is None:
        return []
    total, largest = teacher.parameters, max(teacher.parts.values())
    rows = []
    for part in (*PARTS, "total"):
        before = total if part == "total" else teacher.parts[part]
        after = None if student is None else student.parameters if part == "total" else student.parts[part]
        if not before:
            continue  # tied embeddings have no output layer of their own
        rows.append(
            {
                "part": {"mlp": "MLP"}.get(part, part),
                "before": numbers.count(before),
                "after": "–" if after is None else numbers.count(after),
                "kept": "–" if after is None else numbers.percent(after / before),
                "width": None if part == "total" else (before / largest, (after or 0) / largest),
            }
        )
    return rows


def shape_rows(run: Run) -> list[tuple[str, str, str]]:
    """What pruning may cut: name, teacher's size, student's size; then the bytes on disk."""
    teacher, student = run.models.get("teacher"), small_model(run)
    if teacher is None:
        return []
    rows = [
        (
            text,
            numbers.count(getattr(teacher.shape, key)),
            numbers.count(getattr(student.shape, key)) if student else "–",
        )
        for key, text in SIZES
    ]
    sizes = [numbers.byte_size(model.weight_bytes) if model else "–" for model in (teacher, student)]
    return [*rows, ("weights on disk", sizes[0], sizes[1])]


def evaluation_rows(run: Run) -> list[dict[str, Any]]:
    """One row per task (perplexity first): every model's score, rows, shots, and the share of the teacher kept."""
    rows = []
    if any(perplexity_of(run, label) is not None for label in run.labels):
        values = {label: perplexity_of(run, label) for label in run.labels}
        teacher, student = values.get("teacher"), values.get("student")
        share = f"× {student / teacher:.2f}" if teacher and student else "–"
        cells = [(label, numbers.perplexity(value), "") for label, value in values.items()]
        rows.append(
            {
                "task": "Perplexity",
                "metric": "lower is better",
                "cells": cells,
                "rows": "–",
                "shots": "–",
                "share": share,
            }
        )
    for task in tasks_of(run):
        metric = metric_of(run, task)
        scores = {label: score_of(run, label, task, metric) for label in run.labels}
        teacher, student = (scores[label].value if label in scores else None for label in ("teacher", "student"))
        seen = {key: sorted({getattr(s, key) for s in scores.values()} - {None}) for key in ("rows", "num_fewshot")}
        rows.append(
            {
                "task": task_name(task),
                "metric": metric + (f", chance {CHANCE[task] * 100:.0f} %" if task in CHANCE else ""),
                "cells": [(label, score.text, score.reason) for label, score in scores.items()],
                "rows": ", ".join(f"{value:,}" for value in seen["rows"]) or "–",
                "shots": ", ".join(str(value) for value in seen["num_fewshot"]) or "–",
                "share": numbers.percent(student / teacher) if teacher and student is not None else "–",
            }
        )
    return rows


def score_charts(run: Run) -> list[Chart]:
    """Each task's scores with one standard error to both sides, and the level of guessing."""
    made = []
    for task in tasks_of(run):
        metric = metric_of(run, task)
        scores = {label: score_of(run, label, task, metric) for label in run.labels}
        scores = {label: score for label, score in scores.items() if score.value is not None}
        if metric not in SHARES or not scores:
            continue
        bounds = [score.value + sign * (score.stderr or 0) for score in scores.values() for sign in (-1, 1)]
        chance = [CHANCE[task]] if task in CHANCE else []
        x = charts.linear([*bounds, *chance], label=lambda share: numbers.percent(share, 0), zero=False)
        y = charts.Scale(low=len(scores), high=0, ticks=[(i + 0.5, label) for i, label in enumerate(scores)])
        marks = [
            Mark(kind="dashed", role="muted", path=f"M{round(x.at(value) * charts.VIEW)} 0V{charts.VIEW}")
            for value in chance
        ]
        for i, (label, score) in enumerate(scores.items()):
            role, error = label if label in MODELS else "ink", score.stderr or 0.0
            whisker = (
                f"M{charts.point(x, y, score.value - error, i + 0.5)}H{round(x.at(score.value + error) * charts.VIEW)}"
            )
            marks.append(Mark(kind="line", role=role, path=whisker, title=f"{label}: {score.text}"))
            marks.append(
                Mark(
                    kind="dots",
                    role=role,
                    path=charts.dots(x, y, [score.value], [i + 0.5]),
                    title=f"{label}: {score.text}",
                )
            )
        said = f"Dots: {metric}; bars: one standard error to both sides" + ("; dashed: guessing." if chance else ".")
        made.append(Chart(title=task_name(task), caption=said, x=x, y=y, marks=marks, height_px=34 * len(scores) + 12))
    return made


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """Provenance of every stage, oldest first."""
    return [
        {
            "name": str(stage.get("stage", stage["folder"])),
            "folder": stage["folder"],
            "command": str(stage.get("command", "–")),
            "started_at": str(stage.get("started_at") or "–").replace("T", " ").replace("+00:00", ""),
            "wall": numbers.duration(stage["wall_seconds"]) if stage.get("wall_seconds") is not None else "–",
            "peak": numbers.byte_size(stage["peak_rss_bytes"]) if stage.get("peak_rss_bytes") else "–",
            "inputs": [(label, str(digest)[:HASH_DIGITS]) for label, digest in (stage.get("inputs") or {}).items()],
            "facts": pretty(stage.get("facts")),
            "config": pretty(stage.get("config")),
        }
        for stage in run.stages
    ]


def versions(run: Run) -> list[tuple[str, str]]:
    """Package versions, Python and the commit; where stages differ, all of them."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        known = {"python": stage.get("python"), "git commit": stage.get("git_commit"), **(stage.get("packages") or {})}
        for name, version in known.items():
            if version and str(version) not in found.setdefault(name, []):
                found[name].append(str(version))
    return [(name, ", ".join(items)) for name, items in found.items() if items]


def pretty(value: Mapping[str, Any] | None) -> str:
    """A mapping as indented JSON; empty when there is nothing."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) if value else ""


def missing(run: Run) -> dict[str, str]:
    """One line for every section whose stage has not been run."""
    lines = {
        "sizes": ("" if "teacher" in run.models else "No teacher yet: run fetch or pretrain, or give teacher.path."),
        "importance": ("" if run.axes else "Not scored yet: scores/scores.safetensors is absent."),
        "training": ("" if "train" in run.metrics else "Not distilled yet: train/metrics.jsonl is absent."),
        "evaluation": ("" if run.evals else "Not evaluated yet: eval/ holds no results."),
        "provenance": ("" if run.stages else "No stage has finished in this folder."),
    }
    return {key: line for key, line in lines.items() if line}


def last_command(run: Run) -> str:
    """The command of the newest stage."""
    return str(run.stages[-1].get("command", "")) if run.stages else ""


def finished_on(run: Run) -> str:
    """Date of the newest stage, UTC."""
    return str(run.stages[-1].get("started_at") or "")[:10] if run.stages else ""
