"""Size of activations over the calibration tokens, aggregated by prune.*_aggregation (arXiv 2407.14679 §2.2)."""

import torch
from torch import Tensor

from minitron_train.config import ExpertImportance, HeadNorm, PruneConfig
from minitron_train.pruning.collect import FINAL_NORM
from minitron_train.pruning.criterion import Evidence, Width


def width(evidence: Evidence) -> Width:
    """Channels by the outputs of all norms, heads by the inputs of the output projection, neurons by their activations.

    Experts, and the neurons of each expert, are measured on the tokens that the router sends to the expert.
    """
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
        experts=[
            torch.zeros(0) if kind.is_dense else experts_of(statistics.experts[f"layers.{i}.experts"], prune)
            for i, kind in enumerate(shape.layer_kinds)
            if shape.num_moe_experts
        ],
        shared=[
            torch.zeros(0) if kind.is_dense else aggregate(f"layers.{i}.shared_{prune.neuron_activation}")
            for i, kind in enumerate(shape.layer_kinds)
            if shape.moe_shared_expert_intermediate_size
        ],
    )


def experts_of(sums_3E: Tensor, prune: PruneConfig) -> Tensor:
    """Importance of a layer's experts, [E], by prune.expert_importance; 0 without tokens."""
    tokens, norms, weighted_norms = sums_3E
    if prune.expert_importance is ExpertImportance.tokens:
        return tokens
    total = weighted_norms if prune.expert_importance is ExpertImportance.reap else norms
    return total / tokens.clamp(min=1)
