"""Families that store several linears as one tensor: Phi-3 (arXiv 2404.14219; Phi-4: 2412.08905) and GLM-4 (2406.12793)."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.llama_likes import without_output_bias
from minitron_train.arch.table import CONFIG_DEFAULTS, HF, LAYER, ParamSpec, Windows

QKV = {LAYER + "self_attention.linear_qkv.weight": HF + "self_attn.qkv_proj.weight"}
GATE_UP = {LAYER + "mlp.linear_fc1.weight": HF + "mlp.gate_up_proj.weight"}


def stored_together(stored: dict[str, str]) -> tuple[ParamSpec, ...]:
    """Llama's rows; the parts of each parameter in `stored` are ranges of rows of the tensor that it maps to."""
    return tuple(replace(row, stored_as=stored.get(row.mcore)) for row in LLAMA.rows)


PHI3 = replace(
    LLAMA,
    name="phi3",
    hf_class="Phi3ForCausalLM",
    models="Phi-3, Phi-4",
    rows=stored_together(QKV | GATE_UP),
    partial_rotary=True,
    rope_types=frozenset({"default"}),  # its config class accepts longrope besides
    config_keys={**LLAMA_KEYS, "window": "sliding_window"},
    config_facts={"hidden_act": SILU},
    config_defaults={
        **CONFIG_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "sliding_window": None,
    },
    config_nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    config_read=LLAMA.config_read | {"partial_rotary_factor"},
    windows=Windows.every,
    rules=(),
)
GLM = replace(  # rotates pairs of neighbouring channels, in half of each head
    LLAMA,
    name="glm",
    hf_class="GlmForCausalLM",
    models="GLM-4-9B, GLM-Edge",
    rows=without_output_bias(stored_together(GATE_UP)),
    partial_rotary=True,
    rotary_percent=0.5,
    config_keys={**LLAMA_KEYS, "attention_bias": "attention_bias"},
    config_defaults={
        "attention_bias": True,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1.5625e-7,
        "max_position_embeddings": 131072,
    },
    config_read=LLAMA.config_read | {"partial_rotary_factor"},
    transformer={**LLAMA.transformer, "rotary_interleaved": True},
    rules=(),
)
