"""Nemotron-4 (arXiv 2402.16819): squared ReLU, LayerNorm with zero-centred gamma, half-rotary, GQA, no biases, untied."""

from minitron_train.arch.table import EMBEDDING, LAYER, OUTPUT, Architecture, Row

HF = "model.layers.{i}."
NEMOTRON = Architecture(
    name="nemotron",
    hf_class="NemotronForCausalLM",
    rows=(
        Row(mcore=EMBEDDING, hf={"model.embed_tokens.weight": ("vocab", "embd")}),
        Row(mcore=LAYER + "input_layernorm.weight", hf={HF + "input_layernorm.weight": ("embd",)}),
        Row(mcore=LAYER + "input_layernorm.bias", hf={HF + "input_layernorm.bias": ("embd",)}),
        Row(
            mcore=LAYER + "self_attention.linear_qkv.weight",
            hf={
                HF + "self_attn.q_proj.weight": ("q", "embd"),
                HF + "self_attn.k_proj.weight": ("kv", "embd"),
                HF + "self_attn.v_proj.weight": ("kv", "embd"),
            },
            per_group=True,
        ),
        Row(mcore=LAYER + "self_attention.linear_proj.weight", hf={HF + "self_attn.o_proj.weight": ("embd", "q")}),
        Row(mcore=LAYER + "pre_mlp_layernorm.weight", hf={HF + "post_attention_layernorm.weight": ("embd",)}),
        Row(mcore=LAYER + "pre_mlp_layernorm.bias", hf={HF + "post_attention_layernorm.bias": ("embd",)}),
        Row(mcore=LAYER + "mlp.linear_fc1.weight", hf={HF + "mlp.up_proj.weight": ("ffn", "embd")}),
        Row(mcore=LAYER + "mlp.linear_fc2.weight", hf={HF + "mlp.down_proj.weight": ("embd", "ffn")}),
        Row(mcore="decoder.final_layernorm.weight", hf={"model.norm.weight": ("embd",)}),
        Row(mcore="decoder.final_layernorm.bias", hf={"model.norm.bias": ("embd",)}),
        Row(mcore=OUTPUT, hf={"lm_head.weight": ("vocab", "embd")}),
    ),
    config_keys={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "layernorm_epsilon": "norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    config_facts={"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    transformer={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": False,
        "activation": "squared_relu",
    },
)
