"""Mistral, Qwen2 and Qwen3 against transformers: logits, export, pruning on all axes, and refusals by name."""

import pytest
import torch

from minitron_train import hf
from minitron_train.arch import convert
from minitron_train.arch.build import build
from minitron_train.config import Refit
from minitron_train.errors import UserError
from tests.models import COMMON, exported, hf_logits, save_random
from tests.pruning import configuration, random_tokens, run_cut

FAMILIES = {
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
    checkpoint = hf.Checkpoint(models[family])
    model = build(checkpoint.shape).eval()
    convert.load(model, checkpoint.table, checkpoint.shape, checkpoint)
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


def test_what_is_not_supported_is_refused_by_name():
    base = {**COMMON, "model_type": "mistral", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    with pytest.raises(UserError, match="sliding_window=4096"):
        hf.shape_from_config({**base, "sliding_window": 4096}, "config.json")
    with pytest.raises(UserError, match="sliding_window=4096, which transformers assumes where the key is missing"):
        hf.shape_from_config(base, "config.json")
    with pytest.raises(UserError, match="supported architectures: llama, mistral, nemotron, qwen2, qwen3"):
        hf.shape_from_config({**base, "model_type": "gpt2"}, "config.json")
