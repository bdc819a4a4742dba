"""Gemma (arXiv 2403.08295): Llama with zero-centred gains, gated GELU, and embeddings times sqrt(hidden_size), tied.

Gemma 2 (arXiv 2408.00118): norms also after attention and MLP, soft caps, and a window in every other layer.
"""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, heads_divide_hidden
from minitron_train.arch.table import CONFIG_DEFAULTS, HF, LAYER, POST_NORMS, ParamSpec, Windows

GEMMA_TRANSFORMER = {**LLAMA.transformer, "layernorm_zero_centered_gamma": True, "activation": "gelu_tanh"}
GEMMA = replace(
    LLAMA,
    name="gemma",
    hf_class="GemmaForCausalLM",
    config_keys={**LLAMA_KEYS, "attention_bias": "attention_bias"},
    config_facts={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # transformers reads both as the tanh approximation
        "use_bidirectional_attention": (None, False),
    },
    config_defaults={
        **CONFIG_DEFAULTS,
        "attention_bias": False,
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
GEMMA2_ROWS = (
    *(row for row in LLAMA.rows if row.mcore != LAYER + "pre_mlp_layernorm.weight"),
    ParamSpec(mcore=LAYER + "pre_mlp_layernorm.weight", hf={HF + "pre_feedforward_layernorm.weight": ("embd",)}),
    *POST_NORMS,
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    hf_class="Gemma2ForCausalLM",
    rows=GEMMA2_ROWS,
    config_keys={
        **GEMMA.config_keys,
        "query_scalar": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping",
        "logits_softcap": "final_logit_softcapping",
    },
    config_facts={"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (None, False)},
    config_defaults={
        **GEMMA.config_defaults,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    config_nullable=frozenset({"attn_logit_softcapping", "final_logit_softcapping", "sliding_window"}),
    config_read=LLAMA.config_read | {"sliding_window"},
    windows=Windows(default=lambda config, i: i % 2 == 0),
    rules=(heads_divide_hidden,),
)
