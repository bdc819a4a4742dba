"""Normalised squared change of the logits without a layer: drops the layers with the lowest (arXiv 2511.16664)."""

from torch import Tensor

from minitron_train.pruning.criterion import Evidence, best

NEEDS_LAYER_REMOVAL = True


def depth(evidence: Evidence, num_layers: int) -> Tensor:
    """The layers without which the logits M change most: Σ (M - M_without)² / Σ M² over tokens and vocabulary."""
    changes = evidence.statistics.logit_changes
    assert changes is not None, "scores without logit changes"
    return best(changes, num_layers)
