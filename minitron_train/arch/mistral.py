"""Mistral (arXiv 2310.06825; Mistral NeMo): Llama's tensors, and heads that need not divide the hidden size."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.table import CONFIG_DEFAULTS, Windows

MISTRAL = replace(
    LLAMA,
    name="mistral",
    hf_class="MistralForCausalLM",
    models="Mistral 7B, Mistral NeMo",
    config_keys={**LLAMA_KEYS, "window": "sliding_window"},
    config_facts={"hidden_act": SILU},
    config_defaults={
        **CONFIG_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    config_nullable=frozenset({"head_dim", "sliding_window"}),
    windows=Windows.every,
    rules=(),
)
