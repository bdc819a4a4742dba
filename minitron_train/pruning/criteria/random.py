"""Random scores from `seed`, the baseline of arXiv 2408.11796, figure 6."""

import torch
from torch import Tensor

from minitron_train.pruning.criterion import Evidence, Width


def width(evidence: Evidence) -> Width:
    """Uniform noise for every unit."""
    generator, shape = torch.Generator().manual_seed(evidence.seed), evidence.shape

    def noise(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    layers, experts = range(shape.num_layers), [shape.num_moe_experts] if shape.num_moe_experts else []
    shared = shape.moe_shared_expert_intermediate_size
    return Width(
        embedding=noise(shape.hidden_size),
        heads=[noise(shape.num_attention_heads) for _ in layers],
        ffn=[noise(*experts, shape.ffn_hidden_size) for _ in layers],
        experts=[noise(*experts) for _ in layers] if experts else [],
        shared=[noise(shared) for _ in layers] if shared else [],
    )
