"""Code World Model (Meta, arXiv 2510.02387): Llama 3.1 whose every fourth layer attends to all tokens, the others to a window."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.table import CONFIG_DEFAULTS, Windows

CWM = replace(
    LLAMA,
    name="cwm",
    hf_class="CwmForCausalLM",
    models="Code World Model",
    config_keys=LLAMA_KEYS,
    config_facts={"hidden_act": SILU, "mlp_bias": (False,)},
    config_defaults={
        **CONFIG_DEFAULTS,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "sliding_window": 8192,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    config_nullable=frozenset(),
    config_read=LLAMA.config_read | {"sliding_window"},
    rope_theta=1_000_000.0,
    windows=Windows(default=lambda config, i: i % 4 != 0, is_needed=True),
)
