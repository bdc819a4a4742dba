"""Qwen2 (arXiv 2407.10671): Llama with biases on query, key and value. Qwen3 (2505.09388): norms on query and key instead.

Qwen2-MoE and Qwen3-MoE replace the MLP by experts; Qwen2-MoE adds a shared one with a gate.
"""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.moe import MOE_RULES, mixed_rows, moe_config_keys, moe_rows, shared_rows
from minitron_train.arch.table import (
    CONFIG_DEFAULTS,
    EVERY_LAYER,
    HF,
    LAYER,
    QKV_BIAS,
    WINDOW_KEYS,
    DenseLayers,
    ParamSpec,
    Windows,
)

DEFAULTS = {
    **CONFIG_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
WINDOWS = Windows(
    default=lambda config, i: i >= config["max_window_layers"],
    switch="use_sliding_window",
    first_sliding="max_window_layers",
)
DENSE_LAYERS = DenseLayers(key="mlp_only_layers", interval="decoder_sparse_step", width="intermediate_size")
DENSE_KEYS = {"mlp_only_layers", "decoder_sparse_step", "intermediate_size"}
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
    windows=WINDOWS,
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
    windows=WINDOWS,
    transformer={**LLAMA.transformer, "qk_layernorm": True},
    rules=(),
)
EXPERT_ROWS = tuple(moe_rows(LLAMA.rows, "mlp.gate", "mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"))
QWEN2_MOE = replace(
    QWEN2,
    name="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    models="Qwen1.5-MoE A2.7B, Qwen2 57B-A14B",
    rows=(
        *mixed_rows((*EXPERT_ROWS, *shared_rows("mlp.shared_expert.", "mlp.shared_expert_gate")), LLAMA.rows),
        QKV_BIAS,
    ),
    config_keys={
        **moe_config_keys(LLAMA_KEYS, width="moe_intermediate_size", normalised="norm_topk_prob"),
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    },
    config_facts={"hidden_act": SILU, "qkv_bias": (True,)},
    config_defaults={
        **CONFIG_DEFAULTS,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
        "intermediate_size": 5632,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    config_read=LLAMA.config_read | WINDOW_KEYS | DENSE_KEYS,
    dense_layers=DENSE_LAYERS,
    windows=Windows(
        default=lambda config, i: i % 2 == 0 and i < config["max_window_layers"], switch="use_sliding_window"
    ),
    rules=MOE_RULES,
)
QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    models="Qwen3 30B-A3B, 235B-A22B",
    rows=(*mixed_rows(EXPERT_ROWS, LLAMA.rows), *QK_NORM),
    config_keys=moe_config_keys(QWEN3.config_keys, width="moe_intermediate_size", normalised="norm_topk_prob"),
    config_facts={"hidden_act": SILU},
    config_defaults={
        **CONFIG_DEFAULTS,
        "attention_bias": False,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
        "intermediate_size": 6144,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    config_read=LLAMA.config_read | WINDOW_KEYS - {"max_window_layers"} | DENSE_KEYS,
    dense_layers=DENSE_LAYERS,
    config_aliases={"num_experts": "num_local_experts"},
    config_nullable=frozenset({"sliding_window"}),
    windows=replace(EVERY_LAYER, switch="use_sliding_window"),
    rules=MOE_RULES,
)
