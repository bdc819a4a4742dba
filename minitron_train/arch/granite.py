"""Granite 3 (IBM): Llama with multipliers of embeddings, residual branches and attention scores, and a divisor of logits."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA

FACTOR_KEYS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_multiplier",
    "logits_divisor": "logits_scaling",
}
GRANITE = replace(
    LLAMA,
    name="granite",
    hf_class="GraniteForCausalLM",
    models="Granite 3",
    config_keys={**LLAMA.config_keys, **FACTOR_KEYS},
    config_defaults={**LLAMA.config_defaults, **dict.fromkeys(FACTOR_KEYS.values(), 1.0)},
    config_nullable=frozenset({"num_key_value_heads"}),
    rules=(),
)
