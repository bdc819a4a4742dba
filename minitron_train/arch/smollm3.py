"""SmolLM3 (Hugging Face, 2025): Llama whose every fourth layer has no rotary embedding (arXiv 2501.18795)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron_train.arch.llama import LLAMA
from minitron_train.arch.table import Unrotated, Windows


def is_unrotated(config: Mapping[str, Any], i: int) -> bool:
    """Whether layer `i` has no rotary embedding."""
    listed = config["no_rope_layers"]
    return not (listed[i] if listed is not None else (i + 1) % config["no_rope_layer_interval"])


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    hf_class="SmolLM3ForCausalLM",
    models="SmolLM3",
    config_defaults={
        **LLAMA.config_defaults,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    config_nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    config_read=LLAMA.config_read
    | {"use_sliding_window", "sliding_window", "no_rope_layers", "no_rope_layer_interval"},
    rope_theta=2_000_000.0,
    windows=Windows(default=is_unrotated, switch="use_sliding_window"),
    unrotated=Unrotated(key="no_rope_layers", interval="no_rope_layer_interval", has=is_unrotated),
    rules=(),
)
