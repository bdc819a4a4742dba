"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP instead of before, and over all query and all key heads.

OLMoE (2409.02060) has these norms over heads, Llama's norms before attention and MLP, and experts.
OLMo 3 (arXiv 2512.13961): a window in three of four layers, which have a rotary embedding without scaling.
"""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.llama_likes import heads_fill_hidden
from minitron_train.arch.moe import MOE_RULES, moe_config_keys, moe_rows
from minitron_train.arch.table import CONFIG_DEFAULTS, HF, LAYER, POST_NORMS, LocalRope, ParamSpec, Windows

PRE_NORMS = (LAYER + "input_layernorm.weight", LAYER + "pre_mlp_layernorm.weight")
PROJECTION_NORMS = (
    ParamSpec(mcore=LAYER + "self_attention.q_layernorm.weight", hf={HF + "self_attn.q_norm.weight": ("q",)}),
    ParamSpec(mcore=LAYER + "self_attention.k_layernorm.weight", hf={HF + "self_attn.k_norm.weight": ("kv",)}),
)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    hf_class="Olmo2ForCausalLM",
    models="OLMo 2",
    rows=(*(row for row in LLAMA.rows if row.mcore not in PRE_NORMS), *PROJECTION_NORMS, *POST_NORMS),
    config_keys={**LLAMA_KEYS, "attention_bias": "attention_bias"},
    config_facts={"hidden_act": SILU},
    config_defaults={
        **CONFIG_DEFAULTS,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
    },
    config_nullable=frozenset({"num_key_value_heads"}),
    transformer={**LLAMA.transformer, "qk_layernorm": True},  # megatron-core 0.19 rejects these norms without it
    rules=(),
)
OLMOE = replace(
    OLMO2,
    name="olmoe",
    hf_class="OlmoeForCausalLM",
    models="OLMoE",
    rows=(
        *moe_rows(LLAMA.rows, "mlp.gate", "mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"),
        *PROJECTION_NORMS,
    ),
    config_keys=moe_config_keys(OLMO2.config_keys, width="intermediate_size", normalised="norm_topk_prob"),
    config_facts={"hidden_act": SILU, "clip_qkv": (None,)},
    config_defaults={
        **OLMO2.config_defaults,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    config_aliases={"num_experts": "num_local_experts"},
    rules=(*MOE_RULES, heads_fill_hidden),
)
OLMO3 = replace(
    OLMO2,
    name="olmo3",
    hf_class="Olmo3ForCausalLM",
    models="OLMo 3",
    config_defaults={**OLMO2.config_defaults, "sliding_window": 4096},
    config_nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    config_read=LLAMA.config_read | {"sliding_window"},
    windows=Windows(default=lambda config, i: (i + 1) % 4 != 0, is_needed=True),
    rope_theta=5e5,
    local_rope=LocalRope(key=None, theta=5e5),
)
