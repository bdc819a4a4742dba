"""The page's content, section by section, as plain data for the template."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_train.reporting.load import MODELS, Model, Run
from minitron_train.reporting.summary import metric_of, perplexity_of, score_of, task_name, tasks_of, teacher_name
from minitron_train.runtime import numbers
from minitron_train.runtime.files import byte_size

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


def small_label(run: Run) -> str:
    """Whose sizes stand beside the teacher's."""
    return "student" if "student" in run.models else "pruned"


def lede(run: Run) -> str:
    """The whole run in two sentences, of what is known."""
    teacher, student = run.models.get("teacher"), small_model(run)
    if teacher is None:
        return "There is no teacher in this output folder yet."
    name = teacher_name(run) or ("A teacher trained here" if "pretrain" in run.metrics else "The teacher")
    said = f"{name} ({teacher.shape.architecture}, {numbers.short(teacher.parameters)} parameters)"
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
        detail = f"{len(run.stages)} stages, at most {byte_size(peak)} of memory"
        if any(map(resumed_at, run.stages)):
            detail += "; of a training that was resumed, its last start"
        made.append(Tile(title="Wall time, all stages", value=numbers.duration(total_s), detail=detail))
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
                "width": None if part == "total" else [before / largest, *([] if after is None else [after / largest])],
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
    sizes = [byte_size(model.weight_bytes) if model else "–" for model in (teacher, student)]
    return [*rows, ("weights on disk", sizes[0], sizes[1])]


def sources(run: Run) -> str:
    """ "Tokens drawn from: web 70.0 %, code 30.0 %.", of the run so far."""
    prefix = "source."
    last = {
        name.removeprefix(prefix): values[np.isfinite(values)][-1:]
        for name, values in run.metrics.get("train", {}).items()
        if name.startswith(prefix)
    }
    shares = ", ".join(f"{name} {numbers.percent(float(value[0]))}" for name, value in last.items() if len(value))
    return f"Tokens drawn from: {shares}." if shares else ""


def resumed_at(stage: Mapping[str, Any]) -> int:
    """The step with which a training's last start began; 0 for what was done at once."""
    return stage.get("facts", {}).get("resumed_at_step") or 0


def wall(stage: Mapping[str, Any]) -> str:
    """Seconds of a stage; a training that was resumed knows those of its last start."""
    if stage.get("wall_seconds") is None:
        return "–"
    since = f" from step {resumed_at(stage):,}" if resumed_at(stage) else ""
    return numbers.duration(stage["wall_seconds"]) + since


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """Provenance of every stage, oldest first."""
    return [
        {
            "name": str(stage.get("stage", stage["folder"])),
            "folder": stage["folder"],
            "command": str(stage.get("command", "–")),
            "started_at": str(stage.get("started_at") or "–")[:19].replace("T", " "),
            "wall": wall(stage),
            "peak": byte_size(peak) if (peak := stage.get("peak_rss_bytes")) else "–",
            "inputs": [(label, short_hash(str(digest))) for label, digest in (stage.get("inputs") or {}).items()],
            "facts": pretty(stage.get("facts")),
        }
        for stage in run.stages
    ]


def configurations(run: Run) -> dict[str, list[str]]:
    """Resolved configurations, as indented JSON, with the stages that ran under each."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        if stage.get("config"):
            found.setdefault(pretty(stage["config"]), []).append(str(stage.get("stage", stage["folder"])))
    return found


def versions(run: Run) -> list[tuple[str, str]]:
    """Package versions, Python and the commit; where stages differ, all of them."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        known = {
            "python": stage.get("python"),
            "git commit": short_commit(stage.get("git_commit")),
            **(stage.get("packages") or {}),
        }
        for name, version in known.items():
            if version and str(version) not in found.setdefault(name, []):
                found[name].append(str(version))
    return [(name, ", ".join(items)) for name, items in found.items() if items]


def short_hash(value: str) -> str:
    """The first digits of a sha256; other fingerprints, like a checkpoint's name, stay whole."""
    return value[:HASH_DIGITS] if len(value) == 64 else value


def short_commit(commit: str | None) -> str | None:
    """The commit's first digits, and whether files differed from it."""
    digest, dash, dirty = (commit or "").partition("-")
    return digest[:HASH_DIGITS] + dash + dirty or None


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
