"""Loss without a layer: drops the layers without which it is lowest (arXiv 2407.14679 §2.2, "PPL")."""

from torch import Tensor

from minitron_train.pruning.criterion import Evidence, best

NEEDS_LAYER_REMOVAL = True


def depth(evidence: Evidence, num_layers: int) -> Tensor:
    """The layers whose removal increases the loss most."""
    losses = evidence.statistics.losses_without
    assert losses is not None, "scores without losses"
    return best(losses[:-1], num_layers)
