"""Qwen2 (arXiv 2407.10671): Llama with biases on query, key and value. Qwen3 (2505.09388): norms on query and key instead."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.table import CONFIG_DEFAULTS, HF, LAYER, QKV_BIAS, WINDOW_KEYS, ParamSpec, Windows

DEFAULTS = {
    **CONFIG_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QK_NORM = tuple(
    ParamSpec(mcore=LAYER + f"self_attention.{x}_layernorm.weight", hf={HF + f"self_attn.{x}_norm.weight": ("head",)})
    for x in "qk"
)
QWEN2 = replace(
    LLAMA,
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5",
    rows=(*LLAMA.rows, QKV_BIAS),
    config_keys=LLAMA_KEYS,
    config_facts={"hidden_act": SILU},
    config_defaults=DEFAULTS,
    config_read=LLAMA.config_read | WINDOW_KEYS,
    config_nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    windows=Windows.chosen,
    rules=(),
)
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    models="Qwen3 (dense)",
    rows=(*LLAMA.rows, *QK_NORM),
    config_keys={**LLAMA_KEYS, "attention_bias": "attention_bias"},
    config_facts={"hidden_act": SILU},
    config_defaults={**DEFAULTS, "head_dim": 128, "attention_bias": False},
    config_read=LLAMA.config_read | WINDOW_KEYS,
    config_nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    windows=Windows.chosen,
    transformer={**LLAMA.transformer, "qk_layernorm": True},
    rules=(),
)
