"""Random initial weights. Each tensor has its own seed, so they do not depend on the tensor-parallel size."""

import math
import zlib

import torch
from torch import Tensor

from minitron_train.arch import Shape, architecture


class RandomWeights:
    """A Source of normal weights with standard deviation `std`, as GPT-2 and Megatron-LM initialise (arXiv 1909.08053).

    Projections into the residual stream are scaled by 1/sqrt(2 L). Norm weights are one, biases zero.
    """

    def __init__(self, shape: Shape, std: float, seed: int) -> None:
        self.table, self.shape, self.std, self.seed = architecture(shape.architecture), shape, std, seed
        self.sizes = self.table.tensors(shape)
        self.axes = {
            name.format(i=i): axes
            for row in self.table.rows_of(shape)
            for i in row.layers(shape)
            for name, axes in row.hf.items()
        }

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop) along `dim`."""
        tensor = self._whole(name)
        return tensor if dim is None else tensor.narrow(dim, start, (stop or tensor.shape[dim]) - start)

    def _whole(self, name: str) -> Tensor:
        size, axes = self.sizes[name], self.axes[name]
        if len(axes) == 1:
            zero_centred = self.table.transformer["layernorm_zero_centered_gamma"]
            is_gain = name.endswith(".weight")
            return torch.full(size, 1.0 if is_gain and not zero_centred else 0.0)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        into_residual = axes[0] == "embd"
        std = self.std / math.sqrt(2 * self.shape.num_layers) if into_residual else self.std
        return torch.randn(size, generator=generator) * std
