"""Gemma (arXiv 2403.08295): Llama with zero-centred gains, gated GELU, and embeddings times sqrt(hidden_size), tied."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS
from minitron_train.arch.table import BIAS_DEFAULTS, CONFIG_DEFAULTS

GEMMA_TRANSFORMER = {**LLAMA.transformer, "layernorm_zero_centered_gamma": True, "activation": "gelu_tanh"}
GEMMA = replace(
    LLAMA,
    name="gemma",
    hf_class="GemmaForCausalLM",
    models="Gemma",
    config_keys={**LLAMA_KEYS, "attention_bias": "attention_bias"},
    config_facts={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # transformers reads both as the tanh approximation
        "use_bidirectional_attention": (None, False),
    },
    config_defaults={
        **CONFIG_DEFAULTS,
        "attention_bias": BIAS_DEFAULTS["attention_bias"],
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    config_nullable=frozenset(),
    transformer=GEMMA_TRANSFORMER,
    embeddings_times_root=True,
    rules=(),
)
