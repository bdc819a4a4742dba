"""Mistral, Qwen2, Qwen3 and biases against transformers: logits, export, pruning on all axes, and refusals by name."""

import pytest
import torch

from minitron_train import hf
from minitron_train.config import Refit
from minitron_train.model.build import build
from minitron_train.model.load import load_weights
from tests.support.models import COMMON, exported, hf_logits, save_random
from tests.support.pruning import configuration, random_tokens, run_cut

BIASES = {"attention_bias": True, "mlp_bias": True}
FAMILIES = {
    "llama with biases": {"model_type": "llama", **BIASES, "tie_word_embeddings": False},
    "llama with attention biases": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True},
    "llama with MLP biases": {"model_type": "llama", "mlp_bias": True, "tie_word_embeddings": False},
    "nemotron with biases": {"model_type": "nemotron", **BIASES},
    "qwen3 with biases": {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 12},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
}
TOKENS = random_tokens()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: save_random({**COMMON, **config}, root / name) for name, config in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_export(models, groups, family):
    checkpoint = hf.HFFolder(models[family])
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    with torch.no_grad():
        logits = model.logits(model(TOKENS[0])).transpose(0, 1)
    torch.testing.assert_close(logits, hf_logits(models[family], TOKENS[0]), rtol=0, atol=1e-4)
    found = exported(model, checkpoint)
    assert set(found) == set(checkpoint.sizes)
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_on_every_axis_opens_in_transformers(tmp_path, models, groups, family):
    sizes = {"hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}
    folder = run_cut(tmp_path, models[family], configuration(), TOKENS, groups, **sizes)
    assert torch.isfinite(hf_logits(folder, TOKENS[0])).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_of_nothing_changes_nothing(tmp_path, models, groups, family):
    folder = run_cut(tmp_path, models[family], configuration(refit=Refit.all), TOKENS, groups)
    wanted = hf_logits(models[family], TOKENS[0])
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-3)


SCALED = {"rope_type": "llama3", "factor": 6.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0}
ACCEPTED = {  # config.json, and the lengths at which it must compute what transformers computes
    "window": ({"model_type": "mistral", "sliding_window": 20}, (20, 21, 32)),
    "windows of some layers": (
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        (20, 32),
    ),
    "window of no layer": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
        (32,),
    ),
    "dynamic rope": (
        {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 6.0}, "max_position_embeddings": 32},
        (7, 32),
    ),
    "llama3 with other constants": (
        {"model_type": "llama", "rope_theta": 5e4, "rope_scaling": {**SCALED, "original_max_position_embeddings": 16}},
        (32,),
    ),
    "llama3 in a part of each head": (
        {"model_type": "nemotron", "rope_scaling": {**SCALED, "original_max_position_embeddings": 16}},
        (32,),
    ),
    "linear rope of factor 1, swish": (
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 1.0}, "hidden_act": "swish"},
        (32,),
    ),
    "partial rotary that transformers ignores": ({"model_type": "qwen3", "partial_rotary_factor": 0.5}, (32,)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_computes_what_transformers_computes(tmp_path, groups, name):
    config, lengths = ACCEPTED[name]
    checkpoint = hf.HFFolder(save_random({**COMMON, **config}, tmp_path))
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    for length in lengths:
        tokens = TOKENS[0][:, :length]
        assert tokens.shape[1] == length
        checkpoint.shape.check_length(length, "length", "model")
        with torch.no_grad():
            logits = model.logits(model(tokens)).transpose(0, 1)
        torch.testing.assert_close(logits, hf_logits(tmp_path, tokens), rtol=0, atol=1e-4)
