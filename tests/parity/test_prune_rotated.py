"""Rotation of the residual stream: with every direction kept the model stays what it was; with fewer, it stays nearer."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_train import hf
from minitron_train.arch.table import EMBEDDING
from minitron_train.config import Refit
from minitron_train.pruning.basis import plane_of_mean_zero, principal_basis
from minitron_train.pruning.layers import Layers
from minitron_train.pruning.scoring import gather_evidence
from minitron_train.pruning.select import select
from minitron_train.pruning.shards import RowReader
from minitron_train.pruning.slice import slice_checkpoint
from minitron_train.pruning.target import check_target
from minitron_train.runtime.errors import UserError
from tests.support.models import COMMON, FAMILIES, hf_logits, save_random
from tests.support.pruning import configuration, evidence_of, random_tokens, run_cut

TOKENS = random_tokens(sequences=24)
MODELS = {
    **FAMILIES,
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "nemotron with biases": {**FAMILIES["nemotron"], "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False, "head_dim": 12},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models; the tied one's final norm is constant but for two channels, one of them negative."""
    root = tmp_path_factory.mktemp("rotated")
    found = {name: save_random({**COMMON, **config}, root / name) for name, config in MODELS.items()}
    file = found["llama"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(1.7)[:2] = torch.tensor([-2.0, 4.0])
    save_file(tensors, file, metadata={"format": "pt"})
    return found


def write_rotated(folder, teacher_folder, groups, hidden_size):
    """Nothing cut but the stream."""
    teacher, config = hf.HFFolder(teacher_folder), configuration()
    layers = Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=False)
    student = teacher.shape.smaller(hidden_size=hidden_size)
    statistics = gather_evidence(layers, TOKENS, config.calibration)
    keep = select(evidence_of(teacher, statistics, config.prune), student)
    basis = principal_basis(layers, TOKENS.flatten(0, 1), hidden_size, micro_batch_size=4)
    folder.mkdir()
    slice_checkpoint(teacher, replace(keep, basis=basis), student, folder)
    return folder, basis


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_norm_with_a_dead_channel(tmp_path, models, groups, capsys, bias):
    """A weight of zero: rotated all the same where its bias is zero too, else channels are kept; never a NaN."""
    shutil.copytree(models["nemotron"], tmp_path / "teacher")
    tensors = load_file(tmp_path / "teacher" / "model.safetensors")
    for name, value in (("weight", -1.0), ("bias", bias)):  # stored zero-centred
        tensors[f"model.layers.1.input_layernorm.{name}"][3] = value
    save_file(tensors, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    cut = configuration(refit=Refit.none, rotate=True)
    folder = run_cut(tmp_path, tmp_path / "teacher", cut, TOKENS, groups, hidden_size=48)
    said = "model.layers.1.input_layernorm has a bias where its weight is zero" in capsys.readouterr().out
    assert said == bool(bias)
    assert torch.isfinite(hf_logits(folder, TOKENS[0])).all()


@pytest.mark.parametrize("family", MODELS)
def test_a_rotation_alone_changes_nothing(tmp_path, models, groups, family):
    folder, basis = write_rotated(tmp_path / "whole", models[family], groups, COMMON["hidden_size"])
    wanted = hf_logits(models[family], TOKENS[0])
    # tied: two channels stay as they are, and the ratio of the stream's two lengths is nearly, not quite, constant
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=2e-3)
    assert not torch.equal(hf.HFFolder(folder).read("model.embed_tokens.weight"), basis.down_DH)
    assert basis.variance_D.sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_the_columns_behind_a_norm_are_of_one_size(tmp_path, models, groups, family):
    """Else AdamW, which moves all weights alike, moves the model most where its stream is largest."""
    folder, _ = write_rotated(tmp_path / "cut", models[family], groups, 48)
    checkpoint = hf.HFFolder(folder)
    sizes = [checkpoint.read(f"model.layers.1.self_attn.{x}_proj.weight").square() for x in "qkv"]
    columns = torch.cat(sizes).mean(0).sqrt()
    torch.testing.assert_close(columns, columns[:1].expand_as(columns), rtol=1e-4, atol=0)


def squeeze(folder):
    """Give a random model what trained ones have: a residual stream that is small in most directions, none a channel."""
    checkpoint, file = hf.HFFolder(folder), folder / "model.safetensors"
    tensors = load_file(file)
    axes = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(5))).Q
    shrink = axes * torch.logspace(0, -2, 64) @ axes.t()
    for row in checkpoint.table.rows_of(checkpoint.shape):
        for i in row.layers(checkpoint.shape):
            for name, (first, *rest) in ((name.format(i=i), axes) for name, axes in row.hf.items()):
                if row.mcore == EMBEDDING:
                    tensors[name] = tensors[name] @ shrink
                elif first == "embd" and rest:
                    tensors[name] = shrink @ tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", MODELS)
def test_directions_lose_less_than_channels(tmp_path, models, groups, family):
    teacher = shutil.copytree(models[family], tmp_path / "teacher")
    squeeze(teacher)
    wanted = hf_logits(teacher, TOKENS[0]).log_softmax(-1)

    def divergence(name, **prune):
        config = configuration(refit=Refit.all, norm_scale=True, **prune)
        folder = run_cut(tmp_path / name, teacher, config, TOKENS, groups, hidden_size=48)
        found = hf_logits(folder, TOKENS[0]).log_softmax(-1)
        return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum").item()

    assert divergence("rotated", rotate=True) < 0.8 * divergence("channels", rotate=False)


def test_a_layer_norm_takes_the_same_mean_out_of_both_streams(models, groups, tmp_path):
    _, basis = write_rotated(tmp_path / "cut", models["nemotron"], groups, 48)
    stream = torch.randn(10, COMMON["hidden_size"])
    moved = (stream + 3.0) @ basis.down_DH - stream @ basis.down_DH
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-4)
    rows = plane_of_mean_zero(5)
    torch.testing.assert_close(rows @ rows.t(), torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(rows.sum(1), torch.zeros(4, dtype=torch.float64))


def test_what_cannot_be_rotated_keeps_its_channels(tmp_path, groups, capsys):
    save_random({**COMMON, **FAMILIES["llama"]}, tmp_path / "uneven")
    file = tmp_path / "uneven" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].copy_(torch.linspace(0.1, 5, 64))
    save_file(tensors, file, metadata={"format": "pt"})
    folder = run_cut(tmp_path / "out", tmp_path / "uneven", configuration(rotate=True), TOKENS, groups, hidden_size=48)
    assert "weights are far from their median); keeping channels instead" in capsys.readouterr().out
    assert len(load_file(folder / "kept.safetensors")["embedding"]) == 48
    save_random({**COMMON, **FAMILIES["nemotron"], "tie_word_embeddings": True}, tmp_path / "tied")
    run_cut(tmp_path / "other", tmp_path / "tied", configuration(rotate=True), TOKENS, groups, hidden_size=48)
    assert "(LayerNorm and tied embeddings together)" in capsys.readouterr().out


def test_directions_are_not_cut_in_steps(models):
    shape = hf.HFFolder(models["llama"]).shape
    with pytest.raises(UserError, match=r"prune\.iterations=2: .* prune\.rotate=false"):
        check_target(shape, shape.smaller(hidden_size=48), configuration(rotate=True, iterations=2).prune)
