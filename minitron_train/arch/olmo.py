"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP instead of before, and over all query and all key heads.

OLMo 3 (arXiv 2512.13961): a window in three of four layers, which have a rotary embedding without scaling.
"""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
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
    rules=(),
)
OLMO3 = replace(
    OLMO2,
    name="olmo3",
    hf_class="Olmo3ForCausalLM",
    config_defaults={**OLMO2.config_defaults, "sliding_window": 4096},
    config_nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    config_read=LLAMA.config_read | {"sliding_window"},
    windows=Windows(default=lambda config, i: (i + 1) % 4 != 0),
    rope_theta=5e5,
    local_rope=LocalRope(key=None, theta=5e5),
)
