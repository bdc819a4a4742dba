"""Families with biases, multipliers, other norms or soft caps, from config.json to an exported student, against transformers.

Every family runs through the same tests. `PUBLISHED` holds the numbers of a published config.json of each, and its model's
parameter count on the Hugging Face Hub.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.hf.config import UNTRUE_KEYS
from minitron_train.model.build import LanguageModel, build
from minitron_train.model.forward import KeyValueCache, hidden_states, inference
from minitron_train.model.load import load_weights
from minitron_train.planning import counts
from minitron_train.train.run import train
from tests.support import training as training_runs
from tests.support.models import COMMON, exported, hf_logits, save_random
from tests.support.pruning import configuration, random_tokens, run_cut

TOKENS = random_tokens()
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
}
SIZES = {"hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}
CUT = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "granite-3b-code-base": (
        {
            "model_type": "llama",
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        3_482_503_680,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, training: training_runs.Material) -> dict[str, Path]:
    """One random model of each family, with a tokenizer."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for name, config in FAMILIES.items():
        found[name] = save_random({**COMMON, "vocab_size": training_runs.VOCAB, **config}, root / name)
        hf.copy_tokenizer(training.teacher, found[name])
    return found


def loaded(folder: Path) -> tuple[LanguageModel, hf.HFFolder]:
    """The model of a folder."""
    checkpoint = hf.HFFolder(folder)
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    return model, checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_export_and_generation(models, groups, family):
    """Logits are transformers', also where they come from a key/value cache; the export is what was imported."""
    model, checkpoint = loaded(models[family])
    tokens_BS = TOKENS[0]
    wanted = hf_logits(models[family], tokens_BS)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens_BS)).transpose(0, 1), wanted, rtol=0, atol=1e-4)
    places_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    cache = KeyValueCache()
    with inference(model):
        for part in (slice(0, 20), slice(20, 27), *(slice(i, i + 1) for i in range(27, 32))):
            hidden = hidden_states(model, tokens_BS[:, part], places_BS[:, part], cache=cache, keep=True)
            torch.testing.assert_close(model.output.logits(hidden), wanted[:, part], rtol=0, atol=1e-4)
    found = exported(model, checkpoint)
    assert set(found) == set(checkpoint.sizes)
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in found.items())


@pytest.mark.parametrize("sizes", [{"ffn_hidden_size": 56}, {"num_attention_heads": 4}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_equals_masked(tmp_path, models, groups, family, sizes):
    folder = run_cut(tmp_path, models[family], configuration(), TOKENS, groups, **sizes)
    masked = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    kept = load_file(folder / "kept.safetensors")
    for i, layer in enumerate(masked.model.layers):
        mask_layer(layer, kept, i)
    with torch.no_grad():
        wanted = masked(TOKENS[0]).logits
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-4)


def mask_layer(layer: Any, kept: dict[str, torch.Tensor], i: int) -> None:
    """Zero the columns of the second linears that `kept` drops; a dropped layer adds nothing to the stream."""
    is_dropped = f"layers.{i}.ffn" not in kept
    heads, neurons = (
        torch.tensor([], dtype=torch.int64) if is_dropped else kept[f"layers.{i}.{x}"] for x in ("heads", "ffn")
    )
    channels = (heads[:, None] * COMMON["head_dim"] + torch.arange(COMMON["head_dim"])).flatten()
    for linear, keep in ((layer.self_attn.o_proj, channels), (layer.mlp.down_proj, neurons)):
        mask = torch.zeros(linear.weight.shape[1])
        mask[keep] = 1.0
        linear.weight.data *= mask
        if is_dropped and linear.bias is not None:
            linear.bias.data.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_preset_with_nothing_cut_changes_nothing(tmp_path, models, groups, family):
    folder = run_cut(tmp_path, models[family], configuration("default"), TOKENS, groups)
    wanted = hf_logits(models[family], TOKENS[0])
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_pruned_and_distilled_and_opens_in_transformers(tmp_path, models, groups, training, family):
    """Cut on every axis with the default preset; its config.json keeps every key of the teacher's."""
    pruned = run_cut(tmp_path, models[family], configuration("default"), random_tokens(sequences=24), groups, **SIZES)
    config = training_runs.make_config(training, train__num_tokens=2 * training_runs.ROWS * training_runs.SEQ_LENGTH)
    train(config, groups, student=pruned, teacher=models[family], folder=tmp_path / "train")
    row = training_runs.rows(tmp_path / "train")[-1]
    assert row["step"] == 2
    assert torch.isfinite(torch.tensor([row["loss"], row["grad_norm"]])).all()
    student = tmp_path / "student"
    training_runs.student_of(tmp_path / "train", student)
    assert not torch.equal(*(hf.HFFolder(x).read("model.layers.0.mlp.up_proj.weight") for x in (pruned, student)))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (models[family], student))
    kept = before.keys() - CUT - UNTRUE_KEYS
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    model, _ = loaded(student)
    with torch.no_grad():
        found = model.logits(model(TOKENS[0])).transpose(0, 1)
    torch.testing.assert_close(found, hf_logits(student, TOKENS[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_counts_the_parameters_of_a_published_model(name):
    config, total = PUBLISHED[name]
    assert counts.parameters(hf.shape_from_config(config, name))["parameters"] == total
