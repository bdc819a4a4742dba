"""What may differ between the layers of one model: rotary embedding, attention window, kind of MLP. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OLD_FIELDS = {  # field of Shape in records of earlier versions -> field of Rope; None: of LayerKind
    "rotary_base": "theta",
    "rotary_percent": "percent",
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_length": "original_length",
    "window": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """One rotary embedding: the frequencies at which the channels of queries and keys rotate with their position."""

    kind: str = "default"  # a key of model.rotary.FREQUENCIES
    theta: float = 10000.0
    percent: float = 1.0  # share of each head's channels that is rotated, the first ones
    factor: float = 1.0  # stretches wavelengths; dynamic: only beyond max_position_embeddings
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_length / this are stretched in full
    high_freq_factor: float = 4.0  # llama3: those below original_length / this are not stretched
    original_length: int = 8192  # llama3, yarn, longrope: longest sequence in pretraining, tokens
    attention_factor: float = 1.0  # yarn, longrope: multiplies rotated channels of queries and keys
    beta_fast: float = 32.0  # yarn: channels with more rotations in original_length are not stretched
    beta_slow: float = 1.0  # yarn: those with fewer are stretched in full
    truncate: bool = True  # yarn: whether the channels between are rounded to whole ones
    short_factors: tuple[float, ...] = ()  # longrope: stretch of each wavelength in sequences up to original_length
    long_factors: tuple[float, ...] = ()  # longrope: in longer ones
    query_growth: float = 0.0  # queries are multiplied by 1 + this x log(1 + floor(position / original_length))

    @property
    def scales_queries(self) -> bool:
        """Whether attention scores are scaled."""
        return self.attention_factor != 1.0 or self.query_growth != 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Settings that some layers of a model share."""

    window: int | None = None  # a query attends to itself and the window - 1 tokens before it; None: to all before it
    rope: Rope | None = Rope()  # None: positions are not encoded (NoPE)
    is_dense: bool = False  # in a mixture of experts: whether the layer has a dense MLP instead


def keys_per_query(kind: LayerKind, length: int, *, causal: bool) -> float:
    """Mean number of keys that a query of a sequence of `length` tokens meets.

    Not `causal`: as in papers' figures, which count later keys too.
    """
    width = length if kind.window is None else min(kind.window, length)
    return width - width * width / (2 * length) if causal else width


def kind_of_record(old: Mapping[str, Any]) -> LayerKind:
    """The kind of all layers, from OLD_FIELDS of a record."""
    values = {name: old[key] for key, name in OLD_FIELDS.items() if name and old.get(key) is not None}
    return LayerKind(window=old.get("window"), rope=Rope(kind="llama3" if "factor" in values else "default", **values))
