"""Block importance, 1 - cos between a layer's input and output: drops the layers with the lowest (arXiv 2403.03853)."""

import torch
from torch import Tensor

from minitron_train.pruning.criterion import Evidence, best


def depth(evidence: Evidence, num_layers: int) -> Tensor:
    """The layers that change the direction of the residual stream most."""
    blocks = [evidence.statistics.blocks[f"layers.{i}.block"] for i in range(evidence.shape.num_layers)]
    return best(torch.stack([total / tokens for total, tokens in blocks]), num_layers)
