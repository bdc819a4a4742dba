"""Rotary angles of a model's ropes (arXiv 2104.09864), at every position.

Sources: transformers.modeling_rope_utils 5.23, whose results are the same to the last digits of fp32.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minitron_train.arch.layer_kind import Rope
from minitron_train.arch.shape import Shape

# B batch, S sequence, P positions of the table, F frequencies, C columns of all ropes: angles, and factors of queries


def num_rotated(rope: Rope, kv_channels: int) -> int:
    """The channels of a head that a rope rotates; an odd share is rounded up to pairs."""
    return 2 * len(range(0, int(kv_channels * rope.percent), 2))


def columns(shape: Shape, rope: Rope) -> slice:
    """Where the columns of one rope are in what `Rotary` gives: its angles, then the queries' factor if they grow."""
    widths = [num_rotated(other, shape.kv_channels) + (other.query_growth != 0) for other in shape.ropes]
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


def yarn_frequencies(rope: Rope, plain_F: Tensor) -> Tensor:
    """YaRN's frequencies (arXiv 2309.00071 §3.2): those that rotate often in original_length tokens are not stretched."""
    size = 2 * len(plain_F)

    def pair(rotations: float) -> float:
        """The channel pair that rotates so often, as a real number."""
        return size * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    places_F = torch.arange(len(plain_F), dtype=torch.float32, device=plain_F.device)
    share_F = ((places_F - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain_F / rope.factor * share_F + plain_F * (1 - share_F)


FREQUENCIES: dict[str, Callable[[Rope, Tensor], Tensor]] = {  # kind of rope -> its frequencies from the plain ones
    "default": lambda _, plain_F: plain_F,
    "dynamic": lambda _, plain_F: plain_F,  # up to max_position_embeddings, beyond which sequences are refused
    "linear": lambda rope, plain_F: plain_F / rope.factor,
    "llama3": llama3_frequencies,
    "yarn": yarn_frequencies,
    "longrope": lambda rope, plain_F: plain_F / plain_F.new_tensor(rope.short_factors),
}


def frequencies(rope: Rope, kv_channels: int, device: torch.device, *, is_long: bool = False) -> Tensor:
    """Frequency of every pair of rotated channels, radians per token, fp32 [F].

    Args:
        is_long: for sequences longer than original_length, where LongRoPE has other factors (arXiv 2402.13753).
    """
    rope = replace(rope, short_factors=rope.long_factors) if is_long else rope
    return FREQUENCIES[rope.kind](rope, plain_frequencies(rope, kv_channels, device))


class Rotary(torch.nn.Module):
    """What the layers of a model need of positions, side by side for all its ropes; a layer takes its own `columns`.

    LongRoPE's angles depend on the length of the text. The tables of positions grow when a longer sequence asks for it.

    Attributes:
        switch: the lengths beyond which some angles are others, ascending.
    """

    def __init__(self, shape: Shape, device: torch.device, *, interleaved: bool = False) -> None:
        super().__init__()
        self.shape, self.device, self.interleaved = shape, device, interleaved
        self.switch = sorted({rope.original_length for rope in shape.ropes if rope.kind == "longrope"})
        self.tables_PC = [self._table(0, switch) for switch in (0, *self.switch)]

    def forward(self, length: int) -> Tensor:
        """Columns of the positions 0 … length - 1 of a text of this length, [length, 1, 1, C]."""
        self._reach(length)
        return self.tables_PC[bisect_left(self.switch, length)][:length, None, None]

    def at(self, positions_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Columns of tokens at given positions of texts of given lengths, [S, B, 1, C]."""
        self._reach(int(positions_BS.max()) + 1)
        found_SBC = self.tables_PC[0][positions_BS.T]
        for switch, table_PC in zip(self.switch, self.tables_PC[1:], strict=True):
            found_SBC = torch.where((lengths_B > switch)[:, None], table_PC[positions_BS.T], found_SBC)
        return found_SBC[:, :, None]

    def _reach(self, length: int) -> None:
        if length > len(self.tables_PC[0]):
            length = max(length, min(2 * length, self.shape.max_position_embeddings))
            self.tables_PC = [self._table(length, switch) for switch in (0, *self.switch)]

    def _table(self, length: int, switch: int) -> Tensor:
        """Columns for texts longer than `switch` tokens, [P, C]."""
        positions_P = torch.arange(length, dtype=torch.float32, device=self.device)
        parts: list[Tensor] = []
        for rope in self.shape.ropes:
            is_long = rope.kind == "longrope" and switch >= rope.original_length
            frequencies_F = frequencies(rope, self.shape.kv_channels, self.device, is_long=is_long)
            angles_PF = torch.outer(positions_P, frequencies_F)
            parts += [angles_PF.repeat_interleave(2, dim=1)] if self.interleaved else [angles_PF, angles_PF]
            if rope.query_growth:
                growth_P = rope.query_growth * torch.log1p(torch.floor(positions_P / rope.original_length))
                parts.append(1 + growth_P[:, None])
        return torch.cat(parts, dim=-1) if parts else positions_P[:, None]
