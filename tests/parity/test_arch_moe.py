"""Mixtures of experts against transformers: logits, export, counts of published models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train import hf
from minitron_train.model.build import build
from minitron_train.model.load import load_weights
from minitron_train.planning.counts import parameters
from tests.support.models import COMMON, EXPERTS, exported, hf_logits, save_random
from tests.support.pruning import random_tokens

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", "tie_word_embeddings": False},
    "qwen3_moe, probabilities as they are": {"model_type": "qwen3_moe", "norm_topk_prob": False},
    "mixtral": {"model_type": "mixtral", "intermediate_size": 24},
}
TOKENS = random_tokens()
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rope_theta": 1e6,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("moe")
    return {name: save_random({**COMMON, **EXPERTS, **config}, root / name) for name, config in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_export(models: dict[str, Path], groups: Any, name: str) -> None:
    checkpoint = hf.HFFolder(models[name])
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    with torch.no_grad():
        logits = model.logits(model(TOKENS[0])).transpose(0, 1)
    torch.testing.assert_close(logits, hf_logits(models[name], TOKENS[0]), rtol=0, atol=1e-4)
    found = exported(model, checkpoint)
    assert set(found) == set(checkpoint.sizes) and not checkpoint.unexpected
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704), (MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248)],
)
def test_counts_of_published_models(config: dict[str, Any], total: int, active: int) -> None:
    """The hub's figures: 30,532,122,624 and 46,702,792,704 parameters."""
    counts = parameters(hf.shape_from_config(config, "config.json"))
    assert (counts["parameters"], counts["active_parameters"]) == (total, active)
