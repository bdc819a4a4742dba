"""Rotary angles of a model's ropes (arXiv 2104.09864), at every position.

Sources: transformers.modeling_rope_utils 5.23, whose results are the same to the last digits of fp32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minitron_train.arch.layer_kind import Rope
from minitron_train.arch.shape import Shape

# B batch, S sequence, P positions of the table, F frequencies, C columns of all ropes


def num_rotated(rope: Rope, kv_channels: int) -> int:
    """The channels of a head that a rope rotates; an odd share is rounded up to pairs."""
    return 2 * len(range(0, int(kv_channels * rope.percent), 2))


def columns(shape: Shape, rope: Rope) -> slice:
    """Where the columns of one rope are in the angles of all of the model's ropes."""
    widths = [num_rotated(other, shape.kv_channels) for other in shape.ropes]
    place = shape.ropes.index(rope)
    return slice(sum(widths[:place]), sum(widths[: place + 1]))


def plain_frequencies(rope: Rope, kv_channels: int, device: torch.device) -> Tensor:
    """theta^(-2i / D) for channel pair i of the D rotated channels, radians per token, fp32 [F]."""
    size = int(kv_channels * rope.percent)
    return 1.0 / (rope.theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size))


def llama3_frequencies(rope: Rope, plain_F: Tensor) -> Tensor:
    """Llama 3.1's frequencies for a longer context (arXiv 2407.21783 §3.4.3), in radians per token.

    Wavelengths above original / low_freq_factor tokens are stretched by the factor. Wavelengths below
    original / high_freq_factor are unchanged. Between the two, both are interpolated linearly.
    """
    low, high, length = rope.low_freq_factor, rope.high_freq_factor, rope.original_length
    wavelengths = 2 * math.pi / plain_F
    share_kept = (length / wavelengths - low) / (high - low)
    stretched = plain_F / rope.factor
    mixed = (1 - share_kept) * plain_F / rope.factor + share_kept * plain_F
    scaled = torch.where(wavelengths > length / low, stretched, mixed)
    return torch.where(wavelengths < length / high, plain_F, scaled)


FREQUENCIES: dict[str, Callable[[Rope, Tensor], Tensor]] = {  # kind of rope -> its frequencies from the plain ones
    "default": lambda _, plain_F: plain_F,
    "dynamic": lambda _, plain_F: plain_F,  # up to max_position_embeddings, beyond which sequences are refused
    "llama3": llama3_frequencies,
}


def frequencies(rope: Rope, kv_channels: int, device: torch.device) -> Tensor:
    """Frequency of every pair of rotated channels, radians per token, fp32 [F]."""
    return FREQUENCIES[rope.kind](rope, plain_frequencies(rope, kv_channels, device))


class Rotary(torch.nn.Module):
    """The angles of all ropes of a model, side by side; a layer takes its own `columns`.

    The table of positions grows when a longer sequence asks for it.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.shape, self.device = shape, device
        self.table_PC = self._table(0)

    def forward(self, length: int) -> Tensor:
        """Angles of the positions 0 … length - 1, [length, 1, 1, C]."""
        self._reach(length)
        return self.table_PC[:length, None, None]

    def at(self, positions_BS: Tensor) -> Tensor:
        """Angles of tokens at given positions, [S, B, 1, C]."""
        self._reach(int(positions_BS.max()) + 1)
        return self.table_PC[positions_BS.T][:, :, None]

    def _reach(self, length: int) -> None:
        if length > len(self.table_PC):
            self.table_PC = self._table(max(length, min(2 * length, self.shape.max_position_embeddings)))

    def _table(self, length: int) -> Tensor:
        positions_P = torch.arange(length, dtype=torch.float32, device=self.device)
        parts = []
        for rope in self.shape.ropes:
            angles_PF = torch.outer(positions_P, frequencies(rope, self.shape.kv_channels, self.device))
            parts += [angles_PF, angles_PF]
        return torch.cat(parts, dim=-1) if parts else positions_P[:, None]
