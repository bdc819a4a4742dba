"""Nemotron-4 (arXiv 2402.16819): squared ReLU, LayerNorm with zero-centred gamma, half-rotary, GQA, untied."""

from minitron_train.arch.table import (
    ATTENTION,
    ATTENTION_BIASES,
    BIAS_DEFAULTS,
    BIAS_KEYS,
    CONFIG_KEYS,
    EMBEDDING,
    HF,
    LAYER,
    OUTPUT,
    ROPE_KEYS,
    Architecture,
    ParamSpec,
)

SQUARED_RELU = (  # a plain MLP
    ParamSpec(mcore=LAYER + "mlp.linear_fc1.weight", hf={HF + "mlp.up_proj.weight": ("ffn", "embd")}),
    ParamSpec(mcore=LAYER + "mlp.linear_fc2.weight", hf={HF + "mlp.down_proj.weight": ("embd", "ffn")}),
    ParamSpec(mcore=LAYER + "mlp.linear_fc1.bias", hf={HF + "mlp.up_proj.bias": ("ffn",)}, when="mlp_bias"),
    ParamSpec(mcore=LAYER + "mlp.linear_fc2.bias", hf={HF + "mlp.down_proj.bias": ("embd",)}, when="mlp_bias"),
)
NEMOTRON = Architecture(
    name="nemotron",
    hf_class="NemotronForCausalLM",
    models="Nemotron-4, Minitron",
    rows=(
        ParamSpec(mcore=EMBEDDING, hf={"model.embed_tokens.weight": ("vocab", "embd")}),
        ParamSpec(mcore=LAYER + "input_layernorm.weight", hf={HF + "input_layernorm.weight": ("embd",)}),
        ParamSpec(mcore=LAYER + "input_layernorm.bias", hf={HF + "input_layernorm.bias": ("embd",)}),
        *ATTENTION,
        *ATTENTION_BIASES,
        ParamSpec(mcore=LAYER + "pre_mlp_layernorm.weight", hf={HF + "post_attention_layernorm.weight": ("embd",)}),
        ParamSpec(mcore=LAYER + "pre_mlp_layernorm.bias", hf={HF + "post_attention_layernorm.bias": ("embd",)}),
        *SQUARED_RELU,
        ParamSpec(mcore="decoder.final_layernorm.weight", hf={"model.norm.weight": ("embd",)}),
        ParamSpec(mcore="decoder.final_layernorm.bias", hf={"model.norm.bias": ("embd",)}),
        ParamSpec(mcore=OUTPUT, hf={"lm_head.weight": ("vocab", "embd")}),
    ),
    partial_rotary=True,
    rotary_percent=0.5,
    config_keys={**CONFIG_KEYS, **BIAS_KEYS, "layernorm_epsilon": "norm_eps"},
    config_facts={"hidden_act": ("relu2",)},
    config_defaults={
        **BIAS_DEFAULTS,
        "head_dim": None,
        "tie_word_embeddings": False,
        "norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    config_nullable=frozenset({"head_dim"}),
    config_read=ROPE_KEYS | {"partial_rotary_factor", "layer_types"},
    transformer={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": False,
        "activation": "squared_relu",
    },
)
