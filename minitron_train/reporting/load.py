"""Read an output folder for the report. Data of stages that have not run are absent."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from minitron_train.arch import Shape, architecture
from minitron_train.evaluation.results import Evaluation, read_evaluation
from minitron_train.evaluation.speed import Speed, read_speed
from minitron_train.hf import folder_shape, read_header, weight_bytes
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import PARTIAL, REPLACED
from minitron_train.runtime.records import damaged
from minitron_train.stages import PROVENANCE, exported, provenance
from minitron_train.stages.layout import (
    EVALUATION,
    MODELS,
    PRETRAINING,
    PRUNED,
    SCORES,
    SPEED,
    SPEED_FILE,
    TEACHER,
    TRAININGS,
)
from minitron_train.stages.provenance import StageRecord
from minitron_train.train.metrics import read_rows
from minitron_train.train.tracking import places

CHOSEN_BY = "importance."  # prefix in kept.safetensors, see pruning.select.Keep
BLOCK_KEY = re.compile(r"layers\.([0-9]{1,6})\.block")  # every layer has one

# L layers, U units of one axis in one layer (heads or neurons), H embedding channels, T logged steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One Hugging Face folder. `weight_bytes` is the size of the files that hold its weights."""

    folder: Path
    shape: Shape
    weight_bytes: int

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part: embedding, output, attention, mlp, norms."""
        return architecture(self.shape.architecture).parameters(self.shape)

    @property
    def parameters(self) -> int:
        """Number of parameters; tied weights count once."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Importance and kept units of one axis. Both lists have an entry per teacher layer, or a single one (embedding).

    Attributes:
        scores: per layer, [U] float64.
        kept: per layer, [U] bool; None before pruning.
        rotated: the units are principal directions and their scores are variances (see pruning.basis).
    """

    scores: list[np.ndarray]
    kept: list[np.ndarray] | None
    rotated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The data of one output folder."""

    folder: Path
    stages: list[StageRecord]  # oldest first
    models: dict[str, Model]
    axes: dict[str, Axis]  # embedding, heads, experts, ffn, block
    metrics: dict[str, dict[str, np.ndarray]]  # train, pretrain -> column -> [T] float64, NaN where not logged
    trackers: dict[str, dict[str, str]]  # train, pretrain -> name of a tracker -> address or folder of its run
    evals: dict[str, Evaluation]  # eval/LABEL.json by label
    speed: Speed | None  # speed/speed.json

    @property
    def name(self) -> str:
        """The recipe's name, or else the folder's."""
        configs = [stage["config"] for stage in reversed(self.stages)]
        members = [f"{config.get('name')}-{member}" for config in configs if (member := config.get("member"))]
        names = [config.get("name") for config in configs]
        return next((name for name in [*members, *names] if name), self.folder.name)

    @property
    def labels(self) -> list[str]:
        """Labels of models that exist or were evaluated: teacher, pruned, student, then others by name."""
        known = {*self.models, *self.evals}
        return [*(label for label in MODELS if label in known), *sorted(known.difference(MODELS))]

    def stage(self, name: str) -> StageRecord | None:
        """Return the provenance of one stage; None if it has not run."""
        return next((stage for stage in self.stages if stage["stage"] == name), None)


def load_run(folder: Path, student: Path | None = None) -> Run:
    """Read an output folder.

    Args:
        student: the student's folder; default: the folder of the last export.

    Raises:
        UserError: the folder does not exist, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the output_dir of a run")
    student = student or exported(folder)
    found = list(read_stages(folder, student))
    shared = shared_folder(folder, found)
    if shared != folder:
        found += [stage for stage in read_stages(shared, None) if stage["folder"] in (TEACHER, PRETRAINING)]
    stages = sorted(found, key=lambda stage: (stage.get("started_at", ""), stage["wall_seconds"]))
    return Run(
        folder=folder,
        stages=stages,
        models=dict(read_models(folder, shared, stages, student)),
        axes=read_axes(folder / SCORES / "scores.safetensors", folder / PRUNED / "kept.safetensors"),
        metrics={
            name: columns
            for name, place in TRAININGS.items()
            if (columns := read_metrics(folder / place / "metrics.jsonl"))
        },
        trackers={name: found for name, place in TRAININGS.items() if (found := places(folder / place))},
        evals={
            file.stem: read_evaluation(file)
            for file in sorted((folder / EVALUATION).glob("*.json"))
            if not file.name.endswith(PROVENANCE)
        },
        speed=read_speed(folder / SPEED / SPEED_FILE),
    )


def read_stages(folder: Path, student: Path | None) -> Iterator[StageRecord]:
    """Yield the provenance of every finished stage, also of a student that was exported outside of the output folder."""
    if student and not student.resolve().is_relative_to(folder.resolve()) and (student / PROVENANCE).exists():
        yield {**provenance.read(student / PROVENANCE), "folder": student.name}
    for pattern in (f"*/*{PROVENANCE}", f"*/*/*{PROVENANCE}"):  # eval/ has one per model: teacher.provenance.json
        for file in sorted(folder.glob(pattern)):
            place = file.parent.relative_to(folder)
            if not any(PARTIAL in part or REPLACED in part for part in place.parts):
                yield {**provenance.read(file), "folder": str(place)}


def shared_folder(folder: Path, stages: list[StageRecord]) -> Path:
    """Return the folder that fetch and pretrain wrote into: of a model family's member the family's, if it taught it."""
    configs = [stage["config"] for stage in stages]
    is_member = any(config.get("member") for config in configs)
    has_own_teacher = any((config.get("teacher") or {}).get("path") for config in configs)
    return folder.parent if is_member and not has_own_teacher else folder


def read_models(
    folder: Path, shared: Path, stages: list[StageRecord], student: Path | None
) -> Iterator[tuple[str, Model]]:
    """Yield label and model of teacher, pruned model and student, from the configured paths or the output folder."""
    for label in MODELS:
        sections = [stage["config"].get(MODELS[label]) or {} for stage in reversed(stages)]
        known = [student] if label == "student" and student else []
        made = (shared if label == TEACHER else folder) / label
        for place in [*known, *(Path(path) for section in sections if (path := section.get("path"))), made]:
            if os.path.exists(place / "config.json"):  # noqa: PTH110  # Path.exists raises where a name is too long
                yield label, Model(folder=place, shape=folder_shape(place), weight_bytes=weight_bytes(place))
                break


def read_axes(scores_file: Path, kept_file: Path) -> dict[str, Axis]:
    """Read importance and kept units by axis; empty before scoring. Raw statistics are not read.

    After pruning, the importance is the one that selected the kept units.
    """
    kept = read_tensors(kept_file) if kept_file.exists() else None
    named = (kept or {}).items()
    chosen_by = {name.removeprefix(CHOSEN_BY): value for name, value in named if name.startswith(CHOSEN_BY)}
    scores = read_tensors(scores_file) | chosen_by
    try:
        return axes_of(scores, kept)
    except (IndexError, KeyError, TypeError, ValueError) as error:  # shapes or types do not match
        files = " and ".join(str(file) for file in (scores_file, kept_file) if file.exists())
        raise damaged(files, f"their tensors do not match: {error}", "run score and prune again") from None


def axes_of(scores: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray] | None) -> dict[str, Axis]:
    """Return importance and kept units by axis, from the tensors of both files."""
    layers = sorted(int(match[1]) for key in scores if (match := BLOCK_KEY.fullmatch(key)))
    if layers != list(range(len(layers))):
        raise KeyError(f"layers {layers}")
    axes = {}
    for name in ("embedding", "heads", "experts", "ffn", "block"):
        keys = ["embedding"] if name == "embedding" else [f"layers.{i}.{name}" for i in layers]
        if not all(key in scores for key in keys) or not keys:
            continue
        values = [scores[key].astype(np.float64) for key in keys]
        if name == "block":  # one number per layer; its units are the layers
            values, keys = [np.concatenate(values)], ["layers"]
        if not all(value.ndim == 1 and value.size and np.isfinite(value).all() for value in values):
            raise ValueError(f"{name} is not one row of finite numbers per layer")
        if name == "embedding" and kept is not None and "embedding.variance" in kept:
            axes[name] = rotated_axis(kept)
            continue
        axes[name] = Axis(scores=values, kept=kept_masks(kept, keys, values) if kept is not None else None)
    return axes


def rotated_axis(kept: Mapping[str, np.ndarray]) -> Axis:
    """Return the principal directions of a rotated residual stream with their variances; the kept ones come first."""
    variance_D = kept["embedding.variance"].astype(np.float64)
    mask_D = np.arange(len(variance_D)) < kept["embedding.basis"].shape[1]
    return Axis(scores=[variance_D], kept=[mask_D], rotated=True)


def kept_masks(kept: Mapping[str, np.ndarray], keys: list[str], scores: list[np.ndarray]) -> list[np.ndarray]:
    """Turn kept indices into masks. An axis without a key keeps all units; a dropped layer keeps none."""
    layers = kept.get("layers")
    masks = []
    for i, (key, values) in enumerate(zip(keys, scores, strict=True)):
        dropped = key.startswith("layers.") and layers is not None and i not in layers
        mask = np.full(len(values), key not in kept and not dropped)
        if not dropped and key in kept:
            mask[kept[key]] = True
        masks.append(mask)
    return masks


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a safetensors file except raw statistics; empty if the file does not exist."""
    if not file.exists():
        return {}
    remedy = f"remove {file.parent} and run its stage again"
    read_header(file, remedy=remedy)
    try:
        with safe_open(str(file), framework="np") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys() if not key.startswith("raw.")}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, AttributeError) as error:  # for example a dtype that numpy lacks
        raise damaged(str(file), first_line(error), remedy) from None


def read_metrics(file: Path) -> dict[str, np.ndarray]:
    """Read metrics.jsonl as columns [T], ordered by step; empty if the file does not exist.

    Lines of the same step are merged; the later value wins. A last line that is still being written is skipped. Damaged
    lines are skipped with a warning.

    Raises:
        UserError: the path is not a regular file.
    """
    try:
        found = read_rows(file)
    except FileNotFoundError:
        return {}
    if found.damaged:
        say(f"{file}: skipped {len(found.damaged)} damaged lines, the first is line {min(found.damaged)}")
    rows: dict[int, dict[str, Any]] = {}
    for row in found.values:
        rows.setdefault(row["step"], {}).update(row)
    ordered = [rows[step] for step in sorted(rows)]
    names = sorted({name for row in ordered for name, value in row.items() if is_number(value)})
    return {
        name: np.array([row[name] if is_number(row.get(name)) else np.nan for row in ordered], dtype=np.float64)
        for name in names
    }


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, which a chart can show."""
    return isinstance(value, int | float) and not isinstance(value, bool)
