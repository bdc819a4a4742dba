"""Qwen2 (arXiv 2407.10671): Llama with biases on query, key and value. Qwen3 (2505.09388): norms on query and key instead."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA
from minitron_train.arch.table import HF, LAYER, Row

FACTS = {"hidden_act": "silu", "use_sliding_window": False}
QKV_BIAS = Row(
    mcore=LAYER + "self_attention.linear_qkv.bias",
    hf={
        HF + "self_attn.q_proj.bias": ("q",),
        HF + "self_attn.k_proj.bias": ("kv",),
        HF + "self_attn.v_proj.bias": ("kv",),
    },
    per_group=True,
)
QK_NORM = tuple(
    Row(mcore=LAYER + f"self_attention.{x}_layernorm.weight", hf={HF + f"self_attn.{x}_norm.weight": ("head",)})
    for x in "qk"
)
QWEN2 = replace(
    LLAMA,
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    rows=(*LLAMA.rows, QKV_BIAS),
    config_facts=FACTS,
    transformer={**LLAMA.transformer, "add_qkv_bias": True},
    rules=(),
)
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    rows=(*LLAMA.rows, *QK_NORM),
    config_facts={**FACTS, "attention_bias": False},
    transformer={**LLAMA.transformer, "qk_layernorm": True},
    rules=(),
)
