"""What an output folder holds, read for the report. Whatever a stage has not written yet is simply absent."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from minitron_train.arch import Shape, architecture
from minitron_train.errors import UserError
from minitron_train.files import PARTIAL, REPLACED
from minitron_train.hf import read_header, read_json, shape_from_config
from minitron_train.stages import PROVENANCE, exported

MODELS = ("teacher", "pruned", "student")  # in the order of their making; other labels of eval/ follow
PATH_SETTINGS = {"teacher": "teacher", "pruned": "student", "student": "export"}  # sections whose `path` moves a model
TRAININGS = {"train": "train", "pretrain": "pretrain/train"}
CHOSEN_BY = "importance."  # in kept.safetensors, see prune.select.Keep
LAYER_KEY = re.compile(r"layers\.(\d+)\.(heads|ffn|block)")

# L layers, U units of one axis in one layer (heads or neurons), H embedding channels, T logged steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One Hugging Face folder. `weight_bytes` is the size of its safetensors files."""

    folder: Path
    shape: Shape
    weight_bytes: int

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part: embedding, output, attention, mlp, norms."""
        return architecture(self.shape.architecture).parameters(self.shape)

    @property
    def parameters(self) -> int:
        """All parameters; tied weights count once."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis' importance with what pruning kept. Both lists run over the teacher's layers (one entry: embedding).

    Attributes:
        scores: per layer, [U] float64.
        kept: per layer, [U] bool; None before pruning.
        rotated: whether the units are principal directions and their scores shares of variance (see prune.basis).
    """

    scores: list[np.ndarray]
    kept: list[np.ndarray] | None
    rotated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that was found under one output folder."""

    folder: Path
    stages: list[dict[str, Any]]  # provenance.json of each, oldest first, with "folder" added
    models: dict[str, Model]
    axes: dict[str, Axis]  # embedding, heads, ffn, block
    metrics: dict[str, dict[str, np.ndarray]]  # train, pretrain -> column -> [T] float64, NaN where not logged
    evals: dict[str, dict[str, Any]]  # eval/LABEL.json by label

    @property
    def name(self) -> str:
        """The recipe's name."""
        names = [stage["config"].get("name") for stage in reversed(self.stages) if "config" in stage]
        return next((str(name) for name in names if name), self.folder.name)

    @property
    def labels(self) -> list[str]:
        """Models that were made or evaluated: teacher, pruned, student, then others by name."""
        known = {*self.models, *self.evals}
        return [*(label for label in MODELS if label in known), *sorted(known.difference(MODELS))]

    def stage(self, name: str) -> dict[str, Any] | None:
        """The provenance of one stage."""
        return next((stage for stage in self.stages if stage.get("stage") == name), None)


def load_run(folder: Path, student: Path | None = None) -> Run:
    """Read an output folder.

    Args:
        student: its student's folder; default: where the last export wrote it.

    Raises:
        UserError: there is no such folder, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the output_dir of a run")
    student = student or exported(folder)
    stages = sorted(
        read_stages(folder, student), key=lambda stage: (str(stage.get("started_at", "")), stage.get("wall_seconds", 0))
    )
    return Run(
        folder=folder,
        stages=stages,
        models=dict(read_models(folder, stages, student)),
        axes=read_axes(folder / "scores" / "scores.safetensors", folder / "pruned" / "kept.safetensors"),
        metrics={
            name: columns
            for name, place in TRAININGS.items()
            if (columns := read_metrics(folder / place / "metrics.jsonl"))
        },
        evals={
            file.stem: read_json(file)
            for file in sorted((folder / "eval").glob("*.json"))
            if not file.name.endswith(PROVENANCE)
        },
    )


def read_stages(folder: Path, student: Path | None) -> Iterator[dict[str, Any]]:
    """Provenance of every finished stage, from its own folder or one below, and from a student's folder elsewhere."""
    if student and not student.resolve().is_relative_to(folder.resolve()) and (student / PROVENANCE).exists():
        yield read_json(student / PROVENANCE) | {"folder": student.name}
    for pattern in (f"*/*{PROVENANCE}", f"*/*/*{PROVENANCE}"):  # eval/ has one per model: teacher.provenance.json
        for file in sorted(folder.glob(pattern)):
            place = file.parent.relative_to(folder)
            if not any(PARTIAL in part or REPLACED in part for part in place.parts):
                yield read_json(file) | {"folder": str(place)}


def read_models(folder: Path, stages: list[dict[str, Any]], student: Path | None) -> Iterator[tuple[str, Model]]:
    """The teacher, the pruned model and the student, in the output folder or where the configuration says."""
    for label in MODELS:
        sections = [stage.get("config", {}).get(PATH_SETTINGS[label]) or {} for stage in reversed(stages)]
        known = [student] if label == "student" and student else []
        for place in [*known, *(Path(section["path"]) for section in sections if section.get("path")), folder / label]:
            if (place / "config.json").exists():
                shape = shape_from_config(read_json(place / "config.json"), str(place / "config.json"))
                weight_bytes = sum(file.stat().st_size for file in place.glob("*.safetensors") if file.stem != "kept")
                yield label, Model(folder=place, shape=shape, weight_bytes=weight_bytes)
                break


def read_axes(scores_file: Path, kept_file: Path) -> dict[str, Axis]:
    """Importance and kept units by axis; empty before scoring. Raw statistics are not read.

    Importance is that which the kept units were chosen by, where something has been pruned.
    """
    kept = read_tensors(kept_file) if kept_file.exists() else None
    named = (kept or {}).items()
    chosen_by = {name.removeprefix(CHOSEN_BY): value for name, value in named if name.startswith(CHOSEN_BY)}
    scores = read_tensors(scores_file) | chosen_by
    num_layers = 1 + max((int(match[1]) for key in scores if (match := LAYER_KEY.fullmatch(key))), default=-1)
    axes = {}
    for name in ("embedding", "heads", "ffn", "block"):
        keys = ["embedding"] if name == "embedding" else [f"layers.{i}.{name}" for i in range(num_layers)]
        if not all(key in scores for key in keys) or not keys:
            continue
        values = [scores[key].astype(np.float64) for key in keys]
        if name == "block":  # one number per layer; the kept units are the kept layers
            values, keys = [np.concatenate(values)], ["layers"]
        if name == "embedding" and kept is not None and "embedding.variance" in kept:
            axes[name] = rotated_axis(kept)
            continue
        axes[name] = Axis(scores=values, kept=kept_masks(kept, keys, values) if kept is not None else None)
    return axes


def rotated_axis(kept: Mapping[str, np.ndarray]) -> Axis:
    """The directions of a rotated residual stream by their variance; the kept ones come first."""
    variance_D = kept["embedding.variance"].astype(np.float64)
    mask_D = np.arange(len(variance_D)) < kept["embedding.basis"].shape[1]
    return Axis(scores=[variance_D], kept=[mask_D], rotated=True)


def kept_masks(kept: Mapping[str, np.ndarray], keys: list[str], scores: list[np.ndarray]) -> list[np.ndarray]:
    """Kept indices as masks: an axis that was not cut has no key and keeps all; a dropped layer keeps nothing."""
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
    """The tensors of a safetensors file that are not raw statistics; empty when there is no file."""
    if not file.exists():
        return {}
    read_header(file, remedy=f"remove {file.parent} and run its stage again")
    with safe_open(str(file), framework="np") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys() if not key.startswith("raw.")}  # noqa: SIM118


def read_metrics(file: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl as columns [T], ordered by step.

    A step that was logged twice (a resumed run) is merged, the later line winning; a last line that is still being
    written is left out, and so is a line without the number of its step. Empty when there is no file.
    """
    if not file.exists():
        return {}
    rows: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and is_number(row.get("step")) and math.isfinite(row["step"]):
            rows.setdefault(int(row["step"]), {}).update(row)
    ordered = [rows[step] for step in sorted(rows)]
    names = sorted({name for row in ordered for name, value in row.items() if is_number(value)})
    return {
        name: np.array([row[name] if is_number(row.get(name)) else np.nan for row in ordered], dtype=np.float64)
        for name in names
    }


def is_number(value: Any) -> bool:
    """Whether a JSON value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)
