"""Gemma (arXiv 2403.08295): Llama with zero-centred gains, gated GELU, and embeddings times sqrt(hidden_size), tied.

Gemma 2 (arXiv 2408.00118): norms also after attention and MLP, soft caps, and a window in every other layer.
Gemma 3 (arXiv 2503.19786), text models: norms on query and key, and another rotary embedding in layers with a window.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, heads_divide_hidden
from minitron_train.arch.qwen import QK_NORM
from minitron_train.arch.table import CONFIG_DEFAULTS, HF, LAYER, POST_NORMS, LocalRope, ParamSpec, Windows
from minitron_train.runtime.errors import UserError

GEMMA_TRANSFORMER = {**LLAMA.transformer, "layernorm_zero_centered_gamma": True, "activation": "gelu_tanh"}
GEMMA = replace(
    LLAMA,
    name="gemma",
    hf_class="GemmaForCausalLM",
    models="Gemma",
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
    needs_bos=True,
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
    models="Gemma 2",
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
    windows=Windows(default=lambda config, i: i % 2 == 0, is_needed=True),
    rules=(heads_divide_hidden,),
)


def slides_in_gemma3(config: Mapping[str, Any], i: int) -> bool:
    """Whether layer `i` has a window; older config.json files name the period of layers without one."""
    period = config.get("sliding_window_pattern", 6)
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise UserError(f"config.json: sliding_window_pattern={period!r}: must be a whole number from 1; correct it")
    return (i + 1) % period != 0


GEMMA3_TEXT = replace(
    GEMMA2,
    name="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    models="Gemma 3 (text)",
    rows=(*GEMMA2_ROWS, *QK_NORM),
    config_keys={field: key for field, key in GEMMA2.config_keys.items() if field != "attention_softcap"},
    config_facts={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),  # transformers' class ignores other values
    },
    config_defaults={
        **{key: value for key, value in GEMMA2.config_defaults.items() if key != "attn_logit_softcapping"},
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
    },
    config_nullable=GEMMA2.config_nullable - {"attn_logit_softcapping"},
    transformer={**GEMMA_TRANSFORMER, "qk_layernorm": True},
    windows=Windows(default=slides_in_gemma3, is_needed=True),
    rope_theta=1e6,
    local_rope=LocalRope(key="rope_local_base_freq", theta=1e4),
)
