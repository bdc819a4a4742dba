"""Seed-OSS (ByteDance): Llama with biases on query, key and value, and heads that need not divide the hidden size."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.table import CONFIG_DEFAULTS, QKV_BIAS

SEED_OSS = replace(
    LLAMA,
    name="seed_oss",
    hf_class="SeedOssForCausalLM",
    models="Seed-OSS",
    rows=(*LLAMA.rows, QKV_BIAS),
    config_keys=LLAMA_KEYS,
    config_facts={
        "hidden_act": SILU,
        "attention_bias": (True,),
        "attention_out_bias": (False,),
        "mlp_bias": (False,),
    },
    config_defaults={**CONFIG_DEFAULTS, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288},
    rules=(),
)
