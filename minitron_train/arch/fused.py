"""Families that store several linears as one tensor: Phi-3 (arXiv 2404.14219; Phi-4: 2412.08905) and GLM-4 (2406.12793)."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA, LLAMA_KEYS, SILU
from minitron_train.arch.llama_likes import without_output_bias
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import CONFIG_DEFAULTS, EVERY_LAYER, HF, LAYER, ParamSpec

QKV = {LAYER + "self_attention.linear_qkv.weight": HF + "self_attn.qkv_proj.weight"}
GATE_UP = {LAYER + "mlp.linear_fc1.weight": HF + "mlp.gate_up_proj.weight"}


def stored_together(stored: dict[str, str]) -> tuple[ParamSpec, ...]:
    """Llama's rows; the parts of each parameter in `stored` are ranges of rows of the tensor that it maps to."""
    return tuple(replace(row, stored_as=stored.get(row.mcore)) for row in LLAMA.rows)


def frequencies_fill_heads(shape: Shape) -> str | None:
    """transformers' Phi3Config counts longrope's factors by hidden_size / num_attention_heads, whatever head_dim says."""
    for rope in shape.ropes:
        needed = int(shape.hidden_size // shape.num_attention_heads * rope.percent) // 2
        if rope.kind == "longrope" and len(rope.short_factors) != needed:
            return (
                f"hidden_size={shape.hidden_size} / num_attention_heads={shape.num_attention_heads} must stay "
                f"{shape.kv_channels}, because longrope has {len(rope.short_factors)} factors"
            )
    return None


PHI3 = replace(
    LLAMA,
    name="phi3",
    hf_class="Phi3ForCausalLM",
    models="Phi-3, Phi-4",
    rows=stored_together(QKV | GATE_UP),
    partial_rotary=True,
    rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    config_keys=LLAMA_KEYS,
    config_facts={"hidden_act": SILU},
    config_defaults={
        **CONFIG_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
    config_nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    config_read=LLAMA.config_read | {"partial_rotary_factor", "sliding_window"},
    windows=EVERY_LAYER,
    rules=(frequencies_fill_heads,),
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
