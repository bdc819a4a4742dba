"""The model card: README.md of a student for the Hugging Face Hub. Every number comes from a file of the run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from minitron_train.config import Refit
from minitron_train.evaluation.metrics import is_share, metric_text
from minitron_train.evaluation.serving import llama_cpp_problems, servable_sizes
from minitron_train.hf import auto_class, read_json
from minitron_train.pruning.describe import REFITTED
from minitron_train.reporting.load import MODELS, Model, Run, load_run
from minitron_train.reporting.speed import conditions, labels, speed_rows
from minitron_train.reporting.summary import (
    facts_of,
    metric_of,
    notes,
    perplexity_of,
    results_of,
    score_of,
    section_of,
    source_name,
    task_name,
    tasks_of,
    teacher_name,
)
from minitron_train.reporting.template import template
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_text
from minitron_train.runtime.numbers import percent, perplexity
from minitron_train.runtime.records import damaged, decode_yaml, read_bytes

CARD = "README.md"
PUBLISHED = Path(__file__).parent / "published.yaml"
SIZES = {
    "Layers": "num_layers",
    "Hidden size": "hidden_size",
    "MLP neurons": "ffn_hidden_size",
    "Query heads": "num_attention_heads",
    "Key/value heads": "num_query_groups",
    "Experts": "num_moe_experts",
    "Shared expert's neurons": "moe_shared_expert_intermediate_size",
    "MLP neurons of dense layers": "dense_ffn_hidden_size",
    "Experts of a token": "moe_router_topk",
    "Channels per head": "kv_channels",
    "Vocabulary": "vocab_size",
    "Context, tokens": "max_position_embeddings",
}


def write_card(student_folder: Path, output_dir: Path) -> Path:
    """Write README.md into the student's folder, from the data in `output_dir`. An evaluation writes it again.

    A value that no stage has recorded is omitted. The licence is the teacher's, or none.

    Returns:
        The written file.

    Raises:
        UserError: the student's folder is not a checkpoint, or a file of the run is damaged.
    """
    run = load_run(output_dir, student=student_folder)
    atomic_write_text(student_folder / CARD, render(run, student_folder))
    return student_folder / CARD


def render(run: Run, student_folder: Path) -> str:
    """Return the card as Markdown text."""
    try:
        return template("card.md.jinja").render(facts_for(run, student_folder))
    except (KeyError, jinja2.UndefinedError) as error:  # a key that provenance.Settings and Facts do not require
        remedy = "run the stages again with force=true"
        raise damaged(f"{run.folder}", f"a provenance.json lacks a value of the model card: {error}", remedy) from error


def facts_for(run: Run, student_folder: Path) -> dict[str, Any]:
    """Return the values of the template.

    Raises:
        UserError: the run has no student.
    """
    student = run.models.get("student")
    if student is None:
        raise UserError(f"{run.folder}: no student found; run export first")
    sizes, problems = servable_sizes(student_folder)
    license_name = teacher_license(run)
    return {
        "header": yaml.safe_dump(header(run, license_name), sort_keys=False, allow_unicode=True).strip(),
        "name": run.name,
        "loader": auto_class(read_json(student_folder / "config.json")),
        "source_name": source_name(run),
        "teacher_name": teacher_name(run)
        or f"a teacher{' that was pretrained in the same run' if run.stage('pretrain') else ''}",
        "license": license_name,
        "student": student,
        "teacher": run.models.get("teacher"),
        "share": share_kept(run, student),
        "architecture": architecture_rows(run),
        "pruning": stage_settings(run, "prune", "prune"),
        "repairs": repairs(run),
        "calibration": calibration(run),
        "training": training(run),
        "sources": sources(run),
        "labels": evaluated(run),
        "evaluation": evaluation_rows(run),
        "published": published(run),
        "speed": speed_rows(run),
        "timed": labels(run.speed) if run.speed else [],
        "conditions": conditions(run),
        "notes": [without_folders(line) for line in notes(run)],
        "sizes": sizes,
        "problems": problems + llama_cpp_problems(student_folder),
        "stages": run.stages,
        "commands": list(dict.fromkeys(without_folders(stage["command"]) for stage in run.stages)),
    }


def header(run: Run, license_name: str | None) -> dict[str, Any]:
    """Return the YAML metadata for the Hub, without keys whose value is unknown."""
    settings = section_of(run, "teacher")
    found = {
        "license": license_name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": None if settings.get("path") else settings.get("repo_id"),
        "tags": ["minitron", "pruning", "knowledge-distillation"],
        "model-index": model_index(run),
    }
    return {key: value for key, value in found.items() if value}


def model_index(run: Run) -> list[dict[str, Any]]:
    """Return the student's measured results in the Hub's format."""
    results = []
    for task in results_of(run, "student"):
        score = score_of(run, "student", task)
        if score.value is not None:
            metric = {"type": metric_text(score.metric), "value": round(score.value, 4)}
            results.append(
                {
                    "task": {"type": "text-generation"},
                    "dataset": {
                        "type": task,
                        "name": f"{task_name(task)} ({score.num_fewshot}-shot, {score.rows} rows)",
                    },
                    "metrics": [metric],
                }
            )
    return [{"name": run.name, "results": results}] if results else []


def stage_settings(run: Run, stage: str, section: str) -> Mapping[str, Any]:
    """Return a section of one stage's configuration; empty if the stage has not run."""
    record = run.stage(stage)
    return record["config"].get(section) or {} if record else {}


def without_folders(text: str) -> str:
    """Shorten absolute paths to their last component, because a published card must not reveal a machine's folders."""
    return re.sub(r"(?<![^\s=,'\"\[({])[~/][^\s,;'\"\])}]*/", "…/", text)


def teacher_license(run: Run) -> str | None:
    """Return the licence that the teacher's source states, as an identifier of the Hub; None if it states none."""
    facts = facts_of(run, "fetch teacher")
    if facts.get("license"):
        return str(facts["license"]).lower()
    teacher = run.models.get("teacher")
    if teacher is None:
        return None
    file = teacher.folder / CARD
    try:
        text = read_bytes(file).decode(errors="replace")
        metadata = decode_yaml(text.split("---", 2)[1], str(file), "correct it") if text.startswith("---") else None
    except FileNotFoundError:
        return None
    except UserError as error:  # a damaged README of the teacher does not stop an export
        say(f"{error}; the model card names no licence")
        return None
    return str(metadata["license"]) if isinstance(metadata, dict) and metadata.get("license") else None


def share_kept(run: Run, student: Model) -> str | None:
    """Return the student's parameters as a percentage of the teacher's; None without a teacher."""
    teacher = run.models.get("teacher")
    return percent(student.parameters / teacher.parameters) if teacher else None


def architecture_rows(run: Run) -> list[tuple[str, list[str]]]:
    """Return the sizes of student and teacher, from their config.json files."""
    models = [run.models[label] for label in ("student", "teacher") if label in run.models]
    sizes = {name: [getattr(model.shape, key) for model in models] for name, key in SIZES.items()}
    rows = [(name, [f"{size:,}" for size in values]) for name, values in sizes.items() if any(values)]
    rows.append(("Parameters", [f"{model.parameters:,}" for model in models]))
    inner = [model.parameters - model.parts.get("embedding", 0) - model.parts.get("output", 0) for model in models]
    rows.append(("Parameters without embedding and output layer", [f"{count:,}" for count in inner]))
    rows.append(("Weights on disk, bytes", [f"{model.weight_bytes:,}" for model in models]))
    return rows


def calibration(run: Run) -> dict[str, Any]:
    """Return the settings of the calibration set and its tokens; empty if `score` has not run."""
    facts = facts_of(run, "score")
    return {**stage_settings(run, "score", "calibration"), "tokens_used": facts.get("tokens")} if facts else {}


def repairs(run: Run) -> list[str]:
    """Describe the repairs of the pruned weights, from the settings of the stage `prune`."""
    settings = stage_settings(run, "prune", "prune")
    widths = [run.models[label].shape.hidden_size for label in ("student", "teacher") if label in run.models]
    rotated = settings.get("rotate") and len(set(widths)) == 2
    refit = Refit.__members__.get(settings.get("refit", ""), Refit.none)
    found = ["the residual stream is reduced to its largest principal directions (rotation)"] if rotated else []
    found += ["norm weights are rescaled for the changed denominators"] if settings.get("norm_scale") else []
    return found + ([f"refit by least squares: {REFITTED[refit]}"] if refit is not Refit.none else [])


def training(run: Run) -> dict[str, Any]:
    """Return length and settings of the distillation, from its provenance; empty if `distill` has not run."""
    if run.stage("distill") is None:
        return {}
    loss = objective(stage_settings(run, "distill", "distill"))
    return {**stage_settings(run, "distill", "train"), "objective": loss, **facts_of(run, "distill")}


def objective(distill: Mapping[str, Any]) -> str:
    """Describe the loss, with the weight of each part if it has several."""
    temperature, top_k = distill["temperature"], distill.get("top_k")
    logits = f"the teacher's {top_k} largest logits" if top_k else "the logits of the full vocabulary"
    parts = {
        f"{distill['loss']} on {logits}, temperature {temperature}": distill.get("kd_weight", 1.0),
        "cross-entropy on the labels": distill.get("ce_weight", 0.0),
    }
    found = {text: weight for text, weight in parts.items() if weight}
    words = [text if len(found) == 1 else f"{weight:g} x {text}" for text, weight in found.items()]
    if pairs := distill.get("hidden_layers"):
        words.append(f"{distill['hidden_loss']} between hidden states (student/teacher {', '.join(pairs)})")
    return "; ".join(words)


def sources(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, share of the tokens, fingerprint) of each source of the training data."""
    data, stage = stage_settings(run, "distill", "data"), run.stage("distill")
    hashes = {key.removeprefix("data "): value for key, value in stage["inputs"].items()} if stage else {}
    if data.get("path"):  # replaces the preset's sources
        return [(Path(data["path"]).name, percent(1.0), str(next(iter(hashes.values()), ""))[:16])]
    parts = data.get("sources", {})
    total = sum(source["weight"] for source in parts.values()) or 1.0
    return [(name, percent(source["weight"] / total), str(hashes.get(name, ""))[:16]) for name, source in parts.items()]


def evaluated(run: Run) -> list[str]:
    """Return the labels among teacher, pruned, student that have been evaluated."""
    return [label for label in MODELS if label in run.evals]


def evaluation_rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per task: measured values of the evaluated models, rows, shots, and a published value if known."""
    labels = evaluated(run)
    known = (published(run) or {}).get("results", {})
    rows = []
    values = [perplexity_of(run, label) for label in labels]
    if any(value is not None for value in values):
        cells = [perplexity(value) for value in values]
        rows.append({"task": "Perplexity, held-out text", "cells": cells, "rows": "–", "shots": "–", "published": "–"})
    for task in tasks_of(run):
        metric = metric_of(run, task)
        scores = [score_of(run, label, task, metric) for label in labels]
        measured = next((score for score in scores if score.value is not None), None)
        if measured is None:
            continue
        other = known.get(task)
        rows.append(
            {
                "task": f"{task_name(task)} ({metric_text(metric)})",
                "cells": [score.text if is_share(metric) or score.value is not None else "–" for score in scores],
                "rows": f"{measured.rows:,}",
                "shots": str(measured.num_fewshot),
                "published": f"{other['value']} % ({other['num_fewshot']}-shot)" if other else "–",
            }
        )
    return rows


def published(run: Run) -> dict[str, Any] | None:
    """Return the papers' own results if the run follows one of their recipes, else None."""
    entries = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return next((entry for entry in entries.values() if run.name in entry["recipes"]), None)
