"""The contents of the report page, section by section, as plain data for the template."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron_train.reporting.load import MODELS, Model, Run
from minitron_train.reporting.summary import (
    metric_of,
    perplexity_of,
    score_of,
    source_name,
    task_name,
    tasks_of,
    teacher_name,
)
from minitron_train.runtime import numbers
from minitron_train.runtime.files import byte_size

PARTS = ("embedding", "output", "attention", "mlp", "norms")
SIZES = (
    ("num_layers", "layers"),
    ("hidden_size", "hidden size"),
    ("ffn_hidden_size", "MLP neurons"),
    ("num_attention_heads", "query heads"),
    ("num_query_groups", "KV groups"),
    ("num_moe_experts", "experts"),
    ("moe_router_topk", "experts of a token"),
    ("moe_shared_expert_intermediate_size", "shared expert's neurons"),
    ("dense_ffn_hidden_size", "MLP neurons of dense layers"),
    ("kv_channels", "channels per head"),
    ("vocab_size", "vocabulary"),
)
HASH_DIGITS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One tile of the header: a large value, or one value per model."""

    title: str
    value: str = ""
    detail: str = ""
    rows: list[tuple[str, str]] | None = None  # role (teacher, pruned, student), text


def small_model(run: Run) -> Model | None:
    """Return the student, or the pruned model before distillation."""
    return run.models.get("student") or run.models.get("pruned")


def small_label(run: Run) -> str:
    """Return the label of the model that the page compares with the teacher."""
    return "student" if "student" in run.models else "pruned"


def lede(run: Run) -> str:
    """Summarise the run in two sentences."""
    teacher, student = run.models.get("teacher"), small_model(run)
    if teacher is None:
        return "This output folder has no teacher yet."
    name = teacher_name(run) or ("A teacher pretrained in this run" if "pretrain" in run.metrics else "The teacher")
    text = f"{name} ({teacher.shape.architecture}, {numbers.short(teacher.parameters)} parameters)"
    if student is None:
        return f"{text} has not been pruned yet."
    share = student.parameters / teacher.parameters
    source = source_name(run)
    text += f" taught a student that was pruned from {source}" if source else " was pruned"
    text += f" to {numbers.short(student.parameters)} parameters ({numbers.percent(share)} kept)"
    tokens = run.metrics.get("train", {}).get("tokens")
    text += (
        f" and distilled on {numbers.short(float(tokens[-1]))} tokens."
        if tokens is not None
        else "; not distilled yet."
    )
    found = [(label, perplexity_of(run, label)) for label in MODELS]
    values = ", ".join(f"{label} {numbers.perplexity(value)}" for label, value in found if value is not None)
    return f"{text} Perplexity on held-out text: {values}." if values else text


def tiles(run: Run) -> list[Tile]:
    """Return the tiles of the header."""
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
        detail = f"{len(run.stages)} stages, peak memory {byte_size(peak)}"
        if any(map(resumed_at, run.stages)):
            detail += "; a resumed training counts since its last start"
        made.append(Tile(title="Wall time, all stages", value=numbers.duration(total_s), detail=detail))
    return made


def size_rows(run: Run) -> list[dict[str, Any]]:
    """Return the parameters of teacher and student by part. `width` values are fractions of the teacher's largest part."""
    teacher, student = run.models.get("teacher"), small_model(run)
    if teacher is None:
        return []
    total, largest = teacher.parameters, max(teacher.parts.values())
    rows = []
    for part in (*PARTS, "total"):
        before = total if part == "total" else teacher.parts[part]
        after = None if student is None else student.parameters if part == "total" else student.parts[part]
        if not before:
            continue  # a model with tied embeddings has no separate output layer
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
    """Return (name, teacher's size, student's size) for each dimension of the shape, then the bytes on disk."""
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
        if getattr(teacher.shape, key)
    ]
    sizes = [byte_size(model.weight_bytes) if model else "–" for model in (teacher, student)]
    return [*rows, ("weights on disk", sizes[0], sizes[1])]


def sources(run: Run) -> str:
    """Return the data sources of the run so far: "Tokens drawn from: web 70.0 %, code 30.0 %."."""
    prefix = "source."
    last = {
        name.removeprefix(prefix): values[np.isfinite(values)][-1:]
        for name, values in run.metrics.get("train", {}).items()
        if name.startswith(prefix)
    }
    shares = ", ".join(f"{name} {numbers.percent(float(value[0]))}" for name, value in last.items() if len(value))
    return f"Tokens drawn from: {shares}." if shares else ""


def resumed_at(stage: Mapping[str, Any]) -> int:
    """Return the step at which a training was last resumed; 0 for a stage that was never resumed."""
    return stage.get("facts", {}).get("resumed_at_step") or 0


def wall(stage: Mapping[str, Any]) -> str:
    """Format the seconds of a stage. A resumed training counts only since its last start."""
    if stage.get("wall_seconds") is None:
        return "–"
    since = f" from step {resumed_at(stage):,}" if resumed_at(stage) else ""
    return numbers.duration(stage["wall_seconds"]) + since


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """Return the provenance of every stage, oldest first."""
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
    """Return resolved configuration, as indented JSON -> the stages that used it."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        if stage.get("config"):
            found.setdefault(pretty(stage["config"]), []).append(str(stage.get("stage", stage["folder"])))
    return found


def versions(run: Run) -> list[tuple[str, str]]:
    """Return the versions of packages, Python and the commit; several if stages differ."""
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
    """Shorten a sha256 to its first digits. Other fingerprints, such as a checkpoint's name, stay whole."""
    return value[:HASH_DIGITS] if len(value) == 64 else value


def short_commit(commit: str | None) -> str | None:
    """Shorten a commit to its first digits, with its suffix if files differed from it."""
    digest, dash, dirty = (commit or "").partition("-")
    return digest[:HASH_DIGITS] + dash + dirty or None


def pretty(value: Mapping[str, Any] | None) -> str:
    """Format a mapping as indented JSON; empty text for an empty mapping or None."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) if value else ""


def missing(run: Run) -> dict[str, str]:
    """Return section -> message, for each section whose stage has not run."""
    lines = {
        "sizes": "" if "teacher" in run.models else "No teacher yet: run fetch or pretrain, or set teacher.path.",
        "importance": "" if run.axes else "Not scored yet: scores/scores.safetensors does not exist.",
        "training": "" if "train" in run.metrics else "Not distilled yet: train/metrics.jsonl does not exist.",
        "evaluation": "" if run.evals else "Not evaluated yet: eval/ contains no results.",
        "speed": "" if run.speed else "Not measured yet: speed/speed.json does not exist.",
        "provenance": "" if run.stages else "No stage has finished in this folder.",
    }
    return {key: line for key, line in lines.items() if line}


def last_command(run: Run) -> str:
    """Return the command of the newest stage."""
    return str(run.stages[-1].get("command", "")) if run.stages else ""


def finished_on(run: Run) -> str:
    """Return the UTC date of the newest stage."""
    return str(run.stages[-1].get("started_at") or "")[:10] if run.stages else ""
