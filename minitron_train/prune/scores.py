"""Scores: importance of channels, heads, neurons and layers, derived from raw statistics; and their file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_train import hf
from minitron_train.arch.shape import Shape
from minitron_train.config import PruneConfig, Scope
from minitron_train.errors import UserError
from minitron_train.prune.collect import FINAL_NORM, Statistics
from minitron_train.prune.statistics import Moments

FILE = "scores.safetensors"
SHAPE_KEYS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


@dataclass(frozen=True, slots=True)
class Importance:
    """One number for everything that can be cut; lists have one entry per layer."""

    embedding: Tensor  # [hidden_size]
    heads: list[Tensor]  # [num_attention_heads] each
    ffn: list[Tensor]  # [ffn_hidden_size] each
    block: list[Tensor]  # [1] each: 1 - cos between a layer's input and output
    loss_without: list[Tensor]  # [1] each: loss when the layer is dropped; empty where it was not measured

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        named = {"embedding": self.embedding}
        for i, (heads, ffn, block) in enumerate(zip(self.heads, self.ffn, self.block, strict=True)):
            named |= {f"layers.{i}.heads": heads, f"layers.{i}.ffn": ffn, f"layers.{i}.block": block}
        return named | {f"layers.{i}.loss_without": loss for i, loss in enumerate(self.loss_without)}


def importance(statistics: Statistics, shape: Shape, prune: PruneConfig) -> Importance:
    """Raw statistics -> importance, with the aggregation, scope and hook points of `prune` (arXiv 2407.14679 §2.2)."""

    def aggregate(name: str) -> Tensor:
        return statistics.moments[name].aggregate(prune.sequence_aggregation, prune.batch_aggregation)

    def heads_of(i: int) -> Tensor:
        if prune.head_norm == "token":
            return aggregate(f"layers.{i}.head_norms")
        return torch.linalg.vector_norm(aggregate(f"layers.{i}.head_channels").view(-1, shape.kv_channels), dim=1)

    every = range(shape.num_layers)
    norms = [f"layers.{i}.{norm}" for i in every for norm in ("input_norm", "mlp_norm")]
    norms += [FINAL_NORM] if prune.include_final_norm else []
    heads = [heads_of(i) for i in every]
    ffn = [aggregate(f"layers.{i}.neurons_{prune.neuron_activation}") for i in every]
    blocks = [statistics.blocks[f"layers.{i}.block"] for i in every]
    losses = statistics.losses_without
    return Importance(
        embedding=torch.stack([aggregate(name) for name in norms]).sum(0),
        heads=[sum_layers(heads)] * len(heads) if prune.heads_scope is Scope.network else heads,
        ffn=[sum_layers(ffn)] * len(ffn) if prune.ffn_scope is Scope.network else ffn,
        block=[(total / tokens).view(1) for total, tokens in blocks],
        loss_without=[] if losses is None else list(losses[:-1].split(1)),
    )


def sum_layers(scores: list[Tensor]) -> Tensor:
    """Network-wide importance: "layer-wise scores are then summed up" (arXiv 2407.14679 §2.2)."""
    return torch.stack(scores).sum(0)


@dataclass(frozen=True, slots=True)
class Scores:
    """What scores.safetensors holds: raw statistics, and how they came about."""

    statistics: Statistics
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path, teacher: hf.Checkpoint) -> "Scores":
        """Read scores for `teacher`.

        Raises:
            UserError: no such file, no raw statistics, or scores of another teacher.
        """
        if not path.exists():
            raise UserError(f"{path}: no such file; run `score` first")
        hf.read_header(path, remedy="remove it and run `score` again")
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for key in SHAPE_KEYS:
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
        if not {"samples", "spans"} <= raw.keys() or "tokens" not in metadata:
            raise UserError(f"{path}: no raw statistics in it; remove it and run `score` again")
        statistics = Statistics(teacher.shape.num_layers, num_tokens=int(metadata["tokens"]))
        samples, statistics.spans = raw.pop("samples")[0], raw.pop("spans")
        statistics.losses_without = raw.pop("losses_without", None)
        for name, value in raw.items():
            if name.endswith(".block"):
                statistics.blocks[name] = value
            else:
                statistics.moments[name] = Moments(samples, value[0], value[1])
        return cls(statistics, metadata)


def write(path: Path, statistics: Statistics, shape: Shape, prune: PruneConfig, metadata: dict[str, str]) -> None:
    """The file: scores under `prune` (fp32), raw statistics under `raw.` (fp64), metadata."""
    tensors = {
        name: value.float().contiguous() for name, value in importance(statistics, shape, prune).tensors().items()
    }
    for name, moments in statistics.moments.items():
        tensors[f"raw.{name}"] = torch.stack([moments.mean, moments.deviations])
        tensors["raw.samples"] = moments.count.view(1)
    tensors |= {f"raw.{name}": block for name, block in statistics.blocks.items()}
    assert statistics.spans is not None
    tensors["raw.spans"] = statistics.spans
    if statistics.losses_without is not None:
        tensors["raw.losses_without"] = statistics.losses_without
    described = {
        "aggregation": f"batch={prune.batch_aggregation.value} sequence={prune.sequence_aggregation.value}",
        "preset": prune.preset,
        "samples": str(int(tensors["raw.samples"])),
        "tokens": str(statistics.num_tokens),
        **{key: str(getattr(shape, key)) for key in SHAPE_KEYS},
        **metadata,
    }
    tensors = {name: value.clone() for name, value in tensors.items()}  # no two share memory
    save_file(tensors, path, metadata=described)
