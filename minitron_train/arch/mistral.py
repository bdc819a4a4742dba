"""Mistral (arXiv 2310.06825) and Ministral: Llama's tensors, and heads that need not divide the hidden size."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.table import CONFIG_DEFAULTS, EVERY_LAYER, Windows

MISTRAL = replace(
    LLAMA,
    name="mistral",
    hf_class="MistralForCausalLM",
    models="Mistral 7B, Mistral NeMo",
    config_keys=LLAMA_KEYS,
    config_facts={"hidden_act": SILU},
    config_defaults={
        **CONFIG_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    config_nullable=frozenset({"head_dim", "sliding_window"}),
    config_read=LLAMA.config_read | {"sliding_window"},
    windows=EVERY_LAYER,
    rules=(),
)
MINISTRAL = replace(  # Ministral 8B, 2410
    MISTRAL,
    name="ministral",
    hf_class="MinistralForCausalLM",
    models="Ministral 8B",
    windows=Windows(default=lambda config, i: True, is_needed=True),
)
MINISTRAL3 = replace(  # Ministral 3 3B, 8B and 14B, 2512
    MISTRAL,
    name="ministral3",
    hf_class="Ministral3ForCausalLM",
    models="text model of Ministral 3",
    config_defaults={
        **MISTRAL.config_defaults,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    config_nullable=frozenset({"sliding_window"}),
    query_growth="llama_4_scaling_beta",
)
WITH_LAYER_TYPES = {
    MISTRAL.name: MINISTRAL
}  # what transformers' AutoConfig takes for what if config.json has layer_types
