"""Random scores from `seed`, the baseline of arXiv 2408.11796, figure 6."""

import torch
from torch import Tensor

from minitron_train.pruning.criterion import Evidence, Width


def width(evidence: Evidence) -> Width:
    """Uniform noise for every unit."""
    generator, shape = torch.Generator().manual_seed(evidence.seed), evidence.shape

    def noise(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    units = [shape.unit_sizes(kind) for kind in shape.layer_kinds]
    return Width(
        embedding=noise(shape.hidden_size),
        heads=[noise(shape.num_attention_heads) for _ in units],
        ffn=[noise(*layer["ffn"]) for layer in units],
        experts=[noise(*layer["experts"]) for layer in units] if shape.num_moe_experts else [],
        shared=[noise(*layer["shared"]) for layer in units] if shape.moe_shared_expert_intermediate_size else [],
    )
