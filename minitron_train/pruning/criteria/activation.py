"""Size of activations over the calibration tokens, aggregated by prune.*_aggregation (arXiv 2407.14679 §2.2)."""

import torch
from torch import Tensor

from minitron_train.config import HeadNorm
from minitron_train.pruning.collect import FINAL_NORM
from minitron_train.pruning.criterion import Evidence, Width


def width(evidence: Evidence) -> Width:
    """Channels by the outputs of all norms, heads by the inputs of the output projection, neurons by their activations."""
    statistics, shape, prune = evidence.statistics, evidence.shape, evidence.prune

    def aggregate(name: str) -> Tensor:
        return statistics.moments[name].aggregate(prune.sequence_aggregation, prune.batch_aggregation)

    def heads_of(i: int) -> Tensor:
        if prune.head_norm == HeadNorm.token:
            return aggregate(f"layers.{i}.head_norms")
        return torch.linalg.vector_norm(aggregate(f"layers.{i}.head_channels").view(-1, shape.kv_channels), dim=1)

    every = range(shape.num_layers)
    norms = [f"layers.{i}.{norm}" for i in every for norm in ("input_norm", "mlp_norm")]
    norms += [FINAL_NORM] if prune.include_final_norm else []
    return Width(
        embedding=torch.stack([aggregate(name) for name in norms]).sum(0),
        heads=[heads_of(i) for i in every],
        ffn=[aggregate(f"layers.{i}.neurons_{prune.neuron_activation}") for i in every],
    )
