"""Llama (arXiv 2302.13971; 2407.21783): SwiGLU, RMSNorm, rotary, GQA, optional biases; SmolLM2 is one of them."""

from minitron_train.arch.shape import Shape
from minitron_train.arch.table import (
    ATTENTION,
    ATTENTION_BIASES,
    BIAS_DEFAULTS,
    BIAS_KEYS,
    CONFIG_DEFAULTS,
    CONFIG_KEYS,
    EMBEDDING,
    GATED_MLP_BIASES,
    HF,
    LAYER,
    OUTPUT,
    ROPE_KEYS,
    Architecture,
    ParamSpec,
)

SILU = ("silu", "swish")  # one function, two names
LLAMA_KEYS = {**CONFIG_KEYS, "layernorm_epsilon": "rms_norm_eps"}  # also of Llama's relatives


def heads_divide_hidden(shape: Shape) -> str | None:
    """transformers' LlamaConfig requires this even where head_dim is given."""
    if shape.hidden_size % shape.num_attention_heads == 0:
        return None
    return f"hidden_size={shape.hidden_size} must be a multiple of num_attention_heads={shape.num_attention_heads}"


LLAMA = Architecture(
    name="llama",
    hf_class="LlamaForCausalLM",
    models="Llama 2 and 3, SmolLM2, Granite Code",
    rows=(
        ParamSpec(mcore=EMBEDDING, hf={"model.embed_tokens.weight": ("vocab", "embd")}),
        ParamSpec(mcore=LAYER + "input_layernorm.weight", hf={HF + "input_layernorm.weight": ("embd",)}),
        *ATTENTION,
        *ATTENTION_BIASES,
        ParamSpec(mcore=LAYER + "pre_mlp_layernorm.weight", hf={HF + "post_attention_layernorm.weight": ("embd",)}),
        ParamSpec(
            mcore=LAYER + "mlp.linear_fc1.weight",
            hf={HF + "mlp.gate_proj.weight": ("ffn", "embd"), HF + "mlp.up_proj.weight": ("ffn", "embd")},
        ),
        ParamSpec(mcore=LAYER + "mlp.linear_fc2.weight", hf={HF + "mlp.down_proj.weight": ("embd", "ffn")}),
        *GATED_MLP_BIASES,
        ParamSpec(mcore="decoder.final_layernorm.weight", hf={"model.norm.weight": ("embd",)}),
        ParamSpec(mcore=OUTPUT, hf={"lm_head.weight": ("vocab", "embd")}),
    ),
    config_keys={**LLAMA_KEYS, **BIAS_KEYS},
    config_facts={"hidden_act": SILU},
    config_defaults={**CONFIG_DEFAULTS, **BIAS_DEFAULTS, "max_position_embeddings": 2048},
    config_read=ROPE_KEYS | {"layer_types"},
    transformer={
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": True,
        "activation": "silu",
    },
    rules=(heads_divide_hidden,),
)
