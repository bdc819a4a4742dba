"""Configurations, tokens, and a teacher that is scored and pruned, for the pruning tests."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minitron_train import hf
from minitron_train.config import (
    Aggregation,
    CalibrationConfig,
    Config,
    HeadNorm,
    Merge,
    NeuronActivation,
    PruneConfig,
    Refit,
    Scope,
)
from minitron_train.pruning.collect import Statistics
from minitron_train.pruning.criterion import Evidence

ENUMS: dict[str, Any] = {
    "batch_aggregation": Aggregation,
    "sequence_aggregation": Aggregation,
    "neuron_activation": NeuronActivation,
    "head_norm": HeadNorm,
    "heads_scope": Scope,
    "ffn_scope": Scope,
    "head_merge": Merge,
    "refit": Refit,
}
PLAIN: dict[str, Any] = {"rotate": False, "norm_scale": False, "refit": Refit.none}  # slicing without any repair


def configuration(preset: str | None = None, **prune: Any) -> Config:
    """Plain slicing, or one of conf/prune/*.yaml; small micro-batches, and settings of prune.

    Repairs are fitted to all tokens unless the test says otherwise: the sets of random tokens are as small as a fit allows.
    """
    settings = PLAIN
    if preset:
        file = Path(__file__).parents[2] / "conf" / "prune" / f"{preset}.yaml"
        settings = {key: ENUMS.get(key, lambda x: x)(value) for key, value in yaml.safe_load(file.read_text()).items()}
    chosen = {"held_out_fraction": 0.0} | settings | prune
    return Config(prune=PruneConfig(**chosen), calibration=CalibrationConfig(micro_batch_size=3))


def random_tokens(batches: int = 2, sequences: int = 6, length: int = 32, vocab: int = 128) -> Tensor:
    """Calibration tokens [batches, sequences, length]."""
    return torch.randint(0, vocab, (batches, sequences, length), generator=torch.Generator().manual_seed(3))


def evidence_of(teacher: hf.HFFolder, statistics: Statistics, prune: PruneConfig, seed: int = 0) -> Evidence:
    """What a criterion may look at."""
    return Evidence(
        statistics=statistics, source=teacher, table=teacher.table, shape=teacher.shape, prune=prune, seed=seed
    )


def measured(teacher: hf.HFFolder, tokens: Tensor, groups: Any, **prune: Any) -> Evidence:
    """What a criterion may look at after scoring `tokens` [batches, sequences, length]."""
    from minitron_train.pruning.layers import Layers
    from minitron_train.pruning.scoring import gather_evidence
    from minitron_train.pruning.shards import RowReader

    layers = Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=True)
    statistics = gather_evidence(layers, tokens, CalibrationConfig(micro_batch_size=3))
    return evidence_of(teacher, statistics, PruneConfig(**prune))


def run_cut(folder: Path, teacher_folder: Path, config: Config, tokens: Tensor, groups: Any, **sizes: int) -> Path:
    """Score and prune a teacher; returns the pruned folder."""
    from minitron_train.pruning.prune import prune_checkpoint
    from minitron_train.pruning.scoring import score_checkpoint

    teacher = hf.HFFolder(teacher_folder)
    (folder / "pruned").mkdir(parents=True, exist_ok=True)
    score_checkpoint(config, groups, teacher=teacher, tokens=tokens, folder=folder)
    prune_checkpoint(
        config,
        groups,
        teacher=teacher,
        student=teacher.shape.smaller(config.prune.drop_layers, **sizes),
        scores=folder / "scores.safetensors",
        tokens=lambda: tokens,
        folder=folder / "pruned",
    )
    return folder / "pruned"
