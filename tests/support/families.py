"""Families that are one table each: their settings of a tiny model, and sizes to which it can be cut."""

from pathlib import Path
from typing import Any

from tests.support.models import COMMON, save_random

FULL_HEADS = {"head_dim": 8}  # heads x head_dim is the hidden size, as the family's class requires
TABLES: dict[str, dict[str, Any]] = {
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "ernie4_5": {"tie_word_embeddings": True, "use_bias": True},
    "internlm3": {},
    "iquestcoder": {},
    "helium": FULL_HEADS | {"attention_bias": True, "mlp_bias": True},
    "stablelm": FULL_HEADS | {"use_qkv_bias": True},
    "phi3": {"partial_rotary_factor": 0.75},
    "glm": {},
}
SIZES = {"hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}
OWN_SIZES = dict.fromkeys(("helium", "stablelm"), SIZES | {"hidden_size": 32})  # heads and hidden size together


def save_family(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model of one of TABLES."""
    return save_random({**COMMON, "model_type": family, **TABLES[family], **changes}, folder, seed)
