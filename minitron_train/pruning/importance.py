"""Importance of channels, heads, neurons and layers, derived from raw statistics, and the file that stores both."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_train import hf
from minitron_train.arch.shape import ABSENT, Shape
from minitron_train.config import Scope
from minitron_train.pruning.collect import FINAL_NORM, SHARED, Statistics
from minitron_train.pruning.collect_experts import NEURONS
from minitron_train.pruning.criterion import Evidence, width_criterion
from minitron_train.pruning.statistics import Moments
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.records import Count, damaged

FILE = "scores.safetensors"
SHAPE_KEYS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


@dataclass(frozen=True, slots=True)
class Importance:
    """One score for every unit that can be pruned; lists have one entry per layer, see criterion.Width."""

    embedding: Tensor  # [hidden_size]
    heads: list[Tensor]  # [num_attention_heads] each
    ffn: list[Tensor]  # [ffn_hidden_size] each; with experts [num_moe_experts, ffn_hidden_size]
    block: list[Tensor]  # [1] each: 1 - cos between a layer's input and output
    loss_without: list[Tensor]  # [1] each: loss without the layer; an empty list where it was not measured
    experts: list[Tensor] = field(default_factory=list)  # [num_moe_experts] each; an empty list without experts
    shared: list[Tensor] = field(default_factory=list)  # neurons of shared experts; an empty list without one

    def tensors(self) -> dict[str, Tensor]:
        """The scores by their names in scores.safetensors; the neurons of all experts of a layer are one row."""
        named = {"embedding": self.embedding}
        for i, (heads, ffn, block) in enumerate(zip(self.heads, self.ffn, self.block, strict=True)):
            named |= {f"layers.{i}.heads": heads, f"layers.{i}.ffn": ffn.flatten(), f"layers.{i}.block": block}
        for kind, scores in (("experts", self.experts), ("shared", self.shared)):  # dense layers have none
            named |= {f"layers.{i}.{kind}": values for i, values in enumerate(scores) if len(values)}
        return named | {f"layers.{i}.loss_without": loss for i, loss in enumerate(self.loss_without)}


def importance(evidence: Evidence) -> Importance:
    """Importance by the criterion `prune.width`, and of layers. Heads and neurons are summed over layers if so configured."""
    statistics, prune = evidence.statistics, evidence.prune
    width = width_criterion(prune.width).width(evidence)
    blocks = [statistics.blocks[f"layers.{i}.block"] for i in range(evidence.shape.num_layers)]
    losses = statistics.losses_without
    return Importance(
        embedding=width.embedding,
        heads=sum_layers(width.heads) if prune.heads_scope is Scope.network else width.heads,
        ffn=sum_layers(width.ffn) if prune.ffn_scope is Scope.network else width.ffn,
        block=[(total / tokens).view(1) for total, tokens in blocks],
        loss_without=[] if losses is None else list(losses[:-1].split(1)),
        experts=width.experts,
        shared=sum_layers(width.shared) if width.shared and prune.ffn_scope is Scope.network else width.shared,
    )


def sum_layers(scores: list[Tensor]) -> list[Tensor]:
    """Network-wide importance: "layer-wise scores are then summed up" (arXiv 2407.14679 §2.2), over layers of one size."""
    sums = {size: torch.stack([x for x in scores if x.shape == size]).sum(0) for size in {x.shape for x in scores}}
    return [sums[x.shape] for x in scores]


@dataclass(frozen=True, slots=True)
class Scores:
    """The content of scores.safetensors: raw statistics, and the settings and inputs they were measured with."""

    statistics: Statistics
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path, teacher: hf.HFFolder) -> "Scores":
        """Read scores for `teacher`.

        Raises:
            UserError: the file is missing or damaged, or belongs to another teacher.
        """
        if not path.exists():
            raise UserError(f"{path}: no such file; run `score` first")
        hf.read_header(path, remedy="remove it and run `score` again")
        with opened(path) as file:
            metadata = dict(file.metadata() or {})
            for key in shape_keys(teacher.shape):
                if metadata.get(key) != str(getattr(teacher.shape, key)):
                    raise UserError(
                        f"{path}: scores of a model with {key}={metadata.get(key)}, the teacher has "
                        f"{getattr(teacher.shape, key)}; run `score` again with this teacher"
                    )
            if metadata.get("teacher") != hf.fingerprint(teacher.folder):
                raise UserError(
                    f"{path}: scores of another teacher than {teacher.folder}; run `score` again with this one"
                )
            names = [name for name in list(file.keys()) if name.startswith("raw.")]
            raw = {name.removeprefix("raw."): file.get_tensor(name) for name in names}
        try:
            return cls(statistics_of(raw, metadata, teacher.shape), metadata)
        except (KeyError, ValueError) as error:
            why = f"its raw statistics are incomplete: {error}"
            raise damaged(str(path), why, "remove it and run `score` again") from None


def shape_keys(shape: Shape) -> tuple[str, ...]:
    """The sizes that scores depend on."""
    return (*SHAPE_KEYS, *(key for key in ABSENT if getattr(shape, key)))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open scores.safetensors; a damaged file is a UserError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise damaged(str(path), first_line(error), "remove it and run `score` again") from None


def statistics_of(raw: dict[str, Tensor], metadata: Mapping[str, str], shape: Shape) -> Statistics:
    """Statistics from the tensors named `raw.…` and the metadata.

    Raises:
        KeyError, ValueError: a tensor or a key is missing, or has another type or shape.
    """
    every = range(shape.num_layers)
    tokens = msgspec.convert(metadata["tokens"], Count, strict=False)
    taken = {name: raw.pop(name) for name in ("samples", "spans")}
    taken |= {name: raw.pop(name) for name in ("losses_without", "logit_changes") if name in raw}
    blocks = {f"layers.{i}.block": raw.pop(f"layers.{i}.block") for i in every}
    units = [shape.unit_sizes(kind) for kind in shape.layer_kinds]
    of_experts = {f"layers.{i}.experts": raw.pop(f"layers.{i}.experts") for i in every if units[i]["experts"] != (0,)}
    whole = shape.num_layers + 1
    sizes = {"samples": (1,), "spans": (whole, whole), "losses_without": (whole,), "logit_changes": (len(every),)}
    sizes |= dict.fromkeys(of_experts, (3, shape.num_moe_experts))
    for name, value in (taken | blocks | of_experts).items():
        if tuple(value.shape) != sizes.get(name, (2,)):
            raise ValueError(f"raw.{name} has size {list(value.shape)}")
    channels = shape.num_attention_heads * shape.kv_channels
    widths = {"input_norm": shape.hidden_size, "mlp_norm": shape.hidden_size, "head_channels": channels}
    widths |= {"head_norms": shape.num_attention_heads}
    expected = {FINAL_NORM: (shape.hidden_size,)}
    for i in every:
        measured = {point: (width,) for point, width in widths.items()} | dict.fromkeys(NEURONS, units[i]["ffn"])
        if units[i]["shared"] != (0,):
            measured |= dict.fromkeys(SHARED, units[i]["shared"])
        expected |= {f"layers.{i}.{point}": size for point, size in measured.items()}
    for name, size in expected.items():
        if tuple(raw[name].shape) != (2, 3, *size) or not raw[name].is_floating_point():
            raise ValueError(f"raw.{name} has type {raw[name].dtype} and size {list(raw[name].shape)}")
    return Statistics(
        shape.num_layers,
        num_tokens=tokens,
        moments={name: Moments(taken["samples"][0], *raw[name].unbind()) for name in expected},
        blocks=blocks,
        experts=of_experts,
        losses_without=taken.get("losses_without"),
        logit_changes=taken.get("logit_changes"),
        spans=taken["spans"],
    )


def write(path: Path, evidence: Evidence, metadata: dict[str, str]) -> None:
    """Write the file: scores by `prune` (fp32), raw statistics named `raw.…` (fp64), and metadata."""
    statistics, shape, prune = evidence.statistics, evidence.shape, evidence.prune
    tensors = {name: value.float().contiguous() for name, value in importance(evidence).tensors().items()}
    for name, moments in statistics.moments.items():
        tensors[f"raw.{name}"] = torch.stack([moments.mean, moments.deviations])
        tensors["raw.samples"] = moments.count.view(1)
    tensors |= {f"raw.{name}": sums for name, sums in (statistics.blocks | statistics.experts).items()}
    assert statistics.spans is not None
    tensors["raw.spans"] = statistics.spans
    if statistics.losses_without is not None:
        assert statistics.logit_changes is not None
        tensors["raw.losses_without"] = statistics.losses_without
        tensors["raw.logit_changes"] = statistics.logit_changes
    described = {
        "width": prune.width,
        "aggregation": f"batch={prune.batch_aggregation.value} sequence={prune.sequence_aggregation.value}",
        "preset": prune.preset,
        "samples": str(int(tensors["raw.samples"])),
        "tokens": str(statistics.num_tokens),
        **{key: str(getattr(shape, key)) for key in shape_keys(shape)},
        **metadata,
    }
    tensors = {name: value.clone() for name, value in tensors.items()}  # no two share memory
    save_file(tensors, path, metadata=described)
