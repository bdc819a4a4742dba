"""Llama 3.1's rotary frequency scaling (arXiv 2407.21783 §3.4.3), with the constants of config.json.

megatron-core hard-codes the constants.
"""

import math

import torch
from torch import Tensor

from minitron_train.arch.shape import Shape


def llama3_frequencies(frequencies_D: Tensor, shape: Shape) -> Tensor:
    """Rotary frequencies for a longer context, in radians per token.

    Wavelengths above original / low_freq_factor tokens are stretched by the factor. Wavelengths below
    original / high_freq_factor are unchanged. Between the two, both are interpolated linearly
    (transformers, _compute_llama3_parameters).
    """
    assert shape.rope_scaling_factor is not None
    low, high, length = shape.rope_low_freq_factor, shape.rope_high_freq_factor, shape.rope_original_length
    wavelengths = 2 * math.pi / frequencies_D
    share_kept = (length / wavelengths - low) / (high - low)
    stretched = frequencies_D / shape.rope_scaling_factor
    mixed = (1 - share_kept) * frequencies_D / shape.rope_scaling_factor + share_kept * frequencies_D
    scaled = torch.where(wavelengths > length / low, stretched, mixed)
    return torch.where(wavelengths < length / high, frequencies_D, scaled)
