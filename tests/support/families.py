"""Settings of tiny models of many families, and sizes to which they can be cut."""

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
    "seed_oss": {"tie_word_embeddings": False},
}
GROWTH = {"llama_4_scaling_beta": 0.4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.5, 3.0, 5.0, 8.0],
}
LAYERED: dict[str, dict[str, Any]] = {  # windows and rotary embeddings that differ between layers or grow
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
        "head_dim": 12,
    },
    "qwen3": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "smollm3 with windows": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "ministral": {"model_type": "ministral", "sliding_window": 9},
    "ministral with full layers": {
        "model_type": "ministral",
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "ministral3": {"model_type": "ministral3", "rope_parameters": YARN | GROWTH},
    "ministral3 with a window": {
        "model_type": "ministral3",
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 8} | GROWTH,
    },
    "cwm": {"model_type": "cwm", "sliding_window": 6, "hidden_size": 64, "rope_parameters": LLAMA3},
    "phi3": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.67,
        "original_max_position_embeddings": 32,
        "hidden_size": 96,
        "rope_parameters": LONGROPE,
    },
    "phi3 with a window": {"model_type": "phi3", "sliding_window": 6, "hidden_size": 96},
}
SIZES = {"hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}
OWN_SIZES = dict.fromkeys(("helium", "stablelm"), SIZES | {"hidden_size": 32})  # heads and hidden size together


def save_family(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model of one of TABLES."""
    return save_random({**COMMON, "model_type": family, **TABLES[family], **changes}, folder, seed)


def save_layered(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model of one of LAYERED, whose logits in fp32 are exact to 1e-4 in 300 tokens."""
    common = COMMON | {"max_position_embeddings": 512, "initializer_range": 0.2}
    return save_random(common | LAYERED[name] | changes, folder, seed)
