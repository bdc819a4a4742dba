"""Mixtral (arXiv 2401.04088): Mistral with experts, whose two router probabilities are normalised."""

from dataclasses import replace

from minitron_train.arch.mistral import MISTRAL
from minitron_train.arch.moe import MOE_RULES, moe_config_keys, moe_rows
from minitron_train.arch.table import CONFIG_DEFAULTS

MIXTRAL = replace(
    MISTRAL,
    name="mixtral",
    hf_class="MixtralForCausalLM",
    models="Mixtral 8x7B, 8x22B",
    rows=tuple(moe_rows(MISTRAL.rows, "block_sparse_moe.gate", "block_sparse_moe.experts.{e}.", "w1", "w3", "w2")),
    config_keys=moe_config_keys(MISTRAL.config_keys, width="intermediate_size", experts="num_local_experts"),
    config_defaults={
        **CONFIG_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    rope_theta=1e6,
    config_aliases={"num_local_experts": "num_experts"},
    shape_facts={"norm_topk_prob": True},
    rules=MOE_RULES,
)
