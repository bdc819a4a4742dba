"""Families that differ from Llama by one or two facts: Arcee, ERNIE 4.5, InternLM3, IQuest-Coder and Helium."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS
from minitron_train.arch.nemotron import SQUARED_RELU
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import BIAS_DEFAULTS, CONFIG_DEFAULTS, LAYER, ParamSpec


def heads_fill_hidden(shape: Shape) -> str | None:
    """In transformers the output projection, or OLMoE's norm over all heads, has hidden_size inputs, whatever head_dim is."""
    if shape.num_attention_heads * shape.kv_channels == shape.hidden_size:
        return None
    return (
        f"hidden_size={shape.hidden_size} must be num_attention_heads={shape.num_attention_heads} times "
        f"head_dim={shape.kv_channels}: cut both by the same factor"
    )


def without_output_bias(rows: tuple[ParamSpec, ...]) -> tuple[ParamSpec, ...]:
    """Rows of a family whose attention can have biases on query, key and value, and never on its output."""
    return tuple(row for row in rows if row.mcore != LAYER + "self_attention.linear_proj.bias")


ARCEE = replace(  # arXiv 2002.05202's plain MLP with Nemotron's squared ReLU
    LLAMA,
    name="arcee",
    hf_class="ArceeForCausalLM",
    models="AFM",
    rows=(*(row for row in LLAMA.rows if "mlp." not in row.mcore), *SQUARED_RELU),
    config_facts={"hidden_act": ("relu2",)},
    config_defaults={**CONFIG_DEFAULTS, **BIAS_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    transformer={**LLAMA.transformer, "gated_linear_unit": False, "activation": "squared_relu"},
)
ERNIE_4_5 = replace(  # rotates pairs of neighbouring channels
    LLAMA,
    name="ernie4_5",
    hf_class="Ernie4_5ForCausalLM",
    models="ERNIE 4.5 (dense)",
    config_keys={**LLAMA_KEYS, "attention_bias": "use_bias", "mlp_bias": "use_bias"},
    config_defaults={
        "use_bias": False,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    config_nullable=LLAMA.config_nullable | {"use_bias"},
    rope_theta=500_000.0,
    transformer={**LLAMA.transformer, "rotary_interleaved": True},
    rules=(),
)
INTERNLM3 = replace(  # transformers runs it with Llama's code
    LLAMA,
    name="internlm3",
    hf_class="LlamaForCausalLM",
    models="InternLM3",
    config_keys=LLAMA_KEYS,
    config_facts={  # no published model has biases; the last two are older names of the first two
        **LLAMA.config_facts,
        **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "bias"), (False,)),
    },
    config_defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
    },
)
IQUESTCODER = replace(  # transformers runs it with Llama's code
    LLAMA,
    name="iquestcoder",
    hf_class="LlamaForCausalLM",
    models="IQuest-Coder-V1",
    config_facts={**LLAMA.config_facts, "clip_qkv": (None,), "use_sliding_window": (False, None)},
    config_defaults={
        **BIAS_DEFAULTS,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
)
HELIUM = replace(  # rotates pairs of neighbouring channels
    LLAMA,
    name="helium",
    hf_class="HeliumForCausalLM",
    models="Helium 1",
    rows=without_output_bias(LLAMA.rows),
    config_defaults={
        **BIAS_DEFAULTS,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-8,
        "max_position_embeddings": 4096,
    },
    config_nullable=frozenset(),
    rope_theta=100_000.0,
    transformer={**LLAMA.transformer, "rotary_interleaved": True},
    rules=(heads_fill_hidden,),
)
