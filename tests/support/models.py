"""Tiny random models, made by transformers, which is the oracle of the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_train.arch.convert import export_tensors
from minitron_train.hf import HFFolder
from minitron_train.model.build import LanguageModel, build
from minitron_train.model.load import load_weights, parameters_by_row

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "vocab_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {  # families of dense models ignore these keys
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "nemotron": {
        "model_type": "nemotron",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_untied": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def save_tiny(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of one family; every parameter is random, norms included."""
    return save_random({**COMMON, **FAMILIES[name], **changes}, folder, seed)


def save_random(config: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """Write a random model of any transformers config; norms and biases are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(torch.float32).save_pretrained(folder)
    return folder


def opened(folder: Path) -> tuple[HFFolder, LanguageModel]:
    """A folder, and its model in megatron-core on one rank."""
    checkpoint = HFFolder(folder)
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    return checkpoint, model


def exported(
    model: torch.nn.Module,
    checkpoint: HFFolder,
    gather: Callable[[torch.Tensor], list[torch.Tensor]] = lambda shard: [shard],
) -> dict[str, torch.Tensor]:
    """A model's tensors under their Hugging Face names; `gather` returns the shards of all tensor-parallel ranks."""
    parameters = parameters_by_row(model)
    tensors = export_tensors(
        checkpoint.table, checkpoint.shape, lambda row, i: gather(parameters[row.mcore.format(i=i)].detach())
    )
    return dict(tensors)


def hf_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The logits of transformers [B, S, V], fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens_BS).logits
