"""StableLM (StableLM-3B-4E1T, StableLM 2 1.6B): Llama's linears, LayerNorm with biases, rotary on a quarter of each head."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.llama_likes import heads_fill_hidden, without_output_bias
from minitron_train.arch.table import HF, LAYER, ParamSpec

NORM_BIASES = (
    ParamSpec(mcore=LAYER + "input_layernorm.bias", hf={HF + "input_layernorm.bias": ("embd",)}),
    ParamSpec(mcore=LAYER + "pre_mlp_layernorm.bias", hf={HF + "post_attention_layernorm.bias": ("embd",)}),
    ParamSpec(mcore="decoder.final_layernorm.bias", hf={"model.norm.bias": ("embd",)}),
)
STABLELM = replace(
    LLAMA,
    name="stablelm",
    hf_class="StableLmForCausalLM",
    models="StableLM 3B, StableLM 2 1.6B",
    rows=(*without_output_bias(LLAMA.rows), *NORM_BIASES),
    partial_rotary=True,
    rotates_pairs_only=True,
    rotary_percent=0.25,
    config_keys={
        **{field: key for field, key in LLAMA_KEYS.items() if field != "kv_channels"},  # hidden / heads, always
        "layernorm_epsilon": "layer_norm_eps",
        "attention_bias": "use_qkv_bias",
    },
    config_facts={
        "hidden_act": SILU,
        "qk_layernorm": (False,),
        "use_parallel_residual": (False,),
    },
    config_defaults={
        "num_key_value_heads": 32,
        "use_qkv_bias": False,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    config_nullable=frozenset(),
    config_read=LLAMA.config_read | {"partial_rotary_factor"},
    transformer={**LLAMA.transformer, "normalization": "LayerNorm"},
    rules=(heads_fill_hidden,),
)
