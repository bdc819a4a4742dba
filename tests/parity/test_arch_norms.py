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
from minitron_train.config import Merge, Refit
from minitron_train.hf.config import UNTRUE_KEYS
from minitron_train.model.build import LanguageModel, build
from minitron_train.model.forward import KeyValueCache, hidden_states, inference
from minitron_train.model.load import load_weights
from minitron_train.planning import counts
from minitron_train.pruning.target import check_target
from minitron_train.runtime.errors import UserError
from minitron_train.train.run import train
from tests.support import training as training_runs
from tests.support.models import COMMON, exported, hf_logits, save_random
from tests.support.pruning import configuration, random_tokens, run_cut

TOKENS = random_tokens()
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 8.0,
}
CAPS = {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "granite": {"model_type": "granite", **MULTIPLIERS, "tie_word_embeddings": False},
    "granite, tied": {"model_type": "granite", **MULTIPLIERS, "attention_bias": True, "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2", "head_dim": 8},
    "gemma": {"model_type": "gemma", "head_dim": 20},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 9, **CAPS},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 9, "layer_types": TYPES},
    "olmo3": {"model_type": "olmo3", "head_dim": 8, "sliding_window": 9, "layer_types": TYPES},
    "gemma, untied": {"model_type": "gemma", "tie_word_embeddings": False},
}
POST_NORMS = ("olmo2", "gemma2", "gemma3_text", "olmo3")
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
    "granite-3.0-2b-base": (
        {
            "model_type": "granite",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.015625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        2_533_525_504,
    ),
    "OLMo-2-0425-1B": (
        {
            "model_type": "olmo2",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 100352,
            "tie_word_embeddings": False,
        },
        1_484_916_736,
    ),
    "OLMo-3-1025-7B without its rope": (
        {
            "model_type": "olmo3",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 100278,
            "tie_word_embeddings": False,
        },
        7_298_011_136,
    ),
    "gemma-3-1b-pt": (
        {
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        999_885_952,
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "gemma-2b": (
        {
            "model_type": "gemma",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 256000,
        },
        2_506_172_416,
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
    channels = (heads[:, None] * layer.self_attn.head_dim + torch.arange(layer.self_attn.head_dim)).flatten()
    q_norm = getattr(layer.self_attn, "q_norm", None)
    if (
        q_norm is not None and not is_dropped and len(q_norm.weight) > layer.self_attn.head_dim
    ):  # the mean square is over the kept heads
        mask = torch.zeros(len(q_norm.weight))
        mask[channels] = 1.0
        layer.self_attn.q_proj.weight.data *= mask[:, None]
        q_norm.weight.data *= mask.mean().sqrt()
        q_norm.variance_epsilon *= mask.mean().item()
    for linear, keep in ((layer.self_attn.o_proj, channels), (layer.mlp.down_proj, neurons)):
        mask = torch.zeros(linear.weight.shape[1])
        mask[keep] = 1.0
        linear.weight.data *= mask
        if is_dropped and linear.bias is not None:
            linear.bias.data.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_preset_with_nothing_cut_changes_nothing(tmp_path, models, groups, family):
    folder = run_cut(tmp_path, models[family], configuration("default"), random_tokens(sequences=24), groups)
    wanted = hf_logits(models[family], TOKENS[0])
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_pruned_and_distilled_and_opens_in_transformers(
    tmp_path, models, groups, training, family, capsys
):
    """Cut on every axis with the default preset; its config.json keeps every key of the teacher's."""
    pruned = run_cut(tmp_path, models[family], configuration("default"), random_tokens(sequences=24), groups, **SIZES)
    said = "weigh single channels of the stream); keeping channels instead" in capsys.readouterr().out
    assert said == hf.HFFolder(pruned).table.has_post_norms
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


@pytest.mark.parametrize("family", POST_NORMS)
def test_a_repair_behind_post_norms_brings_the_student_nearer(tmp_path, models, groups, family):
    wanted, tokens = hf_logits(models[family], TOKENS[0]).log_softmax(-1), random_tokens(sequences=24)

    def divergence(**prune: Any) -> float:
        cut = configuration(**prune)
        folder = run_cut(tmp_path / str(prune["refit"]), models[family], cut, tokens, groups, ffn_hidden_size=56)
        found = hf_logits(folder, TOKENS[0]).log_softmax(-1)
        return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum").item()

    assert divergence(refit=Refit.all, norm_scale=True) < 0.8 * divergence(refit=Refit.none)


def test_queries_are_not_merged_behind_a_norm_over_all_of_them(models):
    shape = hf.HFFolder(models["olmo2"]).shape
    with pytest.raises(UserError, match=r"prune\.head_merge=queries: olmo2 has a norm over all query heads"):
        check_target(shape, shape.smaller(num_attention_heads=4), configuration(head_merge=Merge.queries).prune)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("gemma")])
def test_a_student_of_another_width_makes_up_for_the_factor_of_its_embeddings(tmp_path, models, groups, family):
    """transformers multiplies its embeddings by sqrt(48), and the rows were made for sqrt(64)."""
    folder = run_cut(tmp_path, models[family], configuration(), TOKENS, groups, hidden_size=48)
    kept, teacher = load_file(folder / "kept.safetensors")["embedding"], hf.HFFolder(models[family])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embedding, output = plain.model.embed_tokens, plain.lm_head
    output.weight = torch.nn.Parameter(teacher.read(teacher.table.output_name(teacher.shape))[:, kept])
    embedding.weight = torch.nn.Parameter(teacher.read("model.embed_tokens.weight")[:, kept])
    embedding.embed_scale = torch.tensor(8.0)
    plain.model.norm.weight = torch.nn.Parameter(teacher.read("model.norm.weight")[kept])
    with torch.no_grad():
        wanted = plain(TOKENS[0]).logits
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_counts_the_parameters_of_a_published_model(name):
    config, total = PUBLISHED[name]
    assert counts.parameters(hf.shape_from_config(config, name))["parameters"] == total
