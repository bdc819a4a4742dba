"""1 - cos between input and output of neighbouring layers: drops the run with the lowest (arXiv 2403.17887)."""

import torch
from torch import Tensor

from minitron_train.pruning.criterion import Evidence


def depth(evidence: Evidence, num_layers: int) -> Tensor:
    """All layers but the run whose input and output are most similar at the last token."""
    spans, have = evidence.statistics.spans, evidence.shape.num_layers
    assert spans is not None
    length = have - num_layers
    first = int(spans.diagonal(length).argmax())  # cosines between the inputs of layers i and i + length
    return torch.tensor([i for i in range(have) if not first <= i < first + length])
