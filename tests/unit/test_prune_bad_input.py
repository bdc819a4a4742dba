"""What pruning refuses: scores of another model, NaN in activations, too few tokens for a fit; and when it does so."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron_train import hf
from minitron_train.config import Refit
from minitron_train.pruning import scoring as scoring
from minitron_train.pruning.importance import Scores
from minitron_train.pruning.least_squares import LeastSquares
from minitron_train.pruning.prune import prune_checkpoint
from minitron_train.pruning.scoring import score_checkpoint
from minitron_train.pruning.target import check_request
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from tests.support.models import save_tiny
from tests.support.pruning import configuration, random_tokens, run_cut

TOKENS = random_tokens()


@pytest.fixture(scope="module")
def scores(tiny_models, groups, tmp_path_factory):
    """Of the tiny Nemotron."""
    folder = tmp_path_factory.mktemp("scores")
    score_checkpoint(
        configuration(), groups, teacher=hf.HFFolder(tiny_models["nemotron"]), tokens=TOKENS, folder=folder
    )
    return folder / "scores.safetensors"


def cut_with(scores, teacher: hf.HFFolder, groups, folder) -> None:
    folder.mkdir()
    student = teacher.shape.smaller(ffn_hidden_size=56)
    prune_checkpoint(
        configuration(),
        groups,
        teacher=teacher,
        student=student,
        scores=scores,
        tokens=lambda: TOKENS,
        folder=folder,
    )


def test_scores_of_another_teacher(scores, groups, tmp_path):
    """The same shape with other weights."""
    other = hf.HFFolder(save_tiny("nemotron", tmp_path / "other", seed=1))
    with pytest.raises(
        UserError, match=r"scores\.safetensors: scores of another teacher than .*other; run `score` again"
    ):
        cut_with(scores, other, groups, tmp_path / "pruned")
    assert not list((tmp_path / "pruned").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "num_layers=3, the teacher has 2"),
        ({"intermediate_size": 64}, "ffn_hidden_size=96, the teacher has 64"),
        ({"hidden_size": 32}, "hidden_size=64, the teacher has 32"),
        ({"num_key_value_heads": 2}, "num_query_groups=4, the teacher has 2"),
    ],
)
def test_scores_of_another_shape(scores, groups, tmp_path, change, message):
    other = hf.HFFolder(save_tiny("nemotron", tmp_path / "other", **change))
    with pytest.raises(UserError, match=message):
        cut_with(scores, other, groups, tmp_path / "pruned")
    assert not list((tmp_path / "pruned").iterdir())


def test_no_scores_and_damaged_scores(scores, tiny_models, tmp_path):
    teacher = hf.HFFolder(tiny_models["nemotron"])
    with pytest.raises(UserError, match="no such file; run `score` first"):
        Scores.read(tmp_path / "scores.safetensors", teacher)
    (tmp_path / "short.safetensors").write_bytes(scores.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"short\.safetensors"):
        Scores.read(tmp_path / "short.safetensors", teacher)


def test_scores_without_statistics(scores, tiny_models, tmp_path):
    with safe_open(scores, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: value for name, value in load_file(scores).items() if not name.startswith("raw.")}
    save_file(tensors, tmp_path / "scores.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=r"raw statistics are incomplete: .samples.\); remove it and run `score` again"):
        Scores.read(tmp_path / "scores.safetensors", hf.HFFolder(tiny_models["nemotron"]))


def test_what_is_kept_comes_with_its_importance(scores, tiny_models, groups, tmp_path):
    """That of the preset that cut, not of the one that scored."""
    teacher = hf.HFFolder(tiny_models["nemotron"])
    config = configuration("paper")
    (tmp_path / "pruned").mkdir()
    student = teacher.shape.smaller(ffn_hidden_size=56)
    prune_checkpoint(
        config,
        groups,
        teacher=teacher,
        student=student,
        scores=scores,
        tokens=lambda: TOKENS,
        folder=tmp_path / "pruned",
    )
    kept, scored = load_file(tmp_path / "pruned" / "kept.safetensors"), load_file(scores)
    ranked = kept["importance.layers.1.ffn"]
    assert torch.equal(ranked.topk(56).indices.sort().values, kept["layers.1.ffn"])
    assert not torch.equal(ranked, scored["layers.1.ffn"])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", "layers.1.neurons_pre"),
        ("model.layers.2.self_attn.v_proj.weight", "layers.2.head_channels"),
        ("model.norm.weight", "final_norm"),
    ],
)
def test_activations_that_are_not_finite(tiny_models, groups, tmp_path, streamed, value, tensor, named):
    """One damaged weight is named by the first layer whose activations show it."""
    folder = save_tiny("nemotron", tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights[tensor].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = configuration()
    config.calibration.streamed = streamed
    with pytest.raises(UserError, match=f"NaN or infinity, first seen at {named};"):
        score_checkpoint(config, groups, teacher=hf.HFFolder(folder), tokens=TOKENS, folder=tmp_path)
    assert not (tmp_path / "scores.safetensors").exists()


def test_padding_does_not_hide_a_nan_nor_make_one(tiny_models, groups, tmp_path):
    tokens = TOKENS.clone()
    tokens[:, :, 20:] = -1
    score_checkpoint(
        configuration(), groups, teacher=hf.HFFolder(tiny_models["nemotron"]), tokens=tokens, folder=tmp_path
    )
    assert (
        int(Scores.read(tmp_path / "scores.safetensors", hf.HFFolder(tiny_models["nemotron"])).metadata["tokens"])
        == 240
    )


def test_too_few_tokens_for_a_fit(tiny_models, groups, tmp_path):
    """96 inputs need 384 tokens; neither padding nor held-out tokens count."""
    tokens = TOKENS.clone()
    config = configuration(refit=Refit.all, held_out_fraction=0.0)
    run_cut(tmp_path / "enough", tiny_models["nemotron"], config, tokens, groups)
    tokens[:, :, 31:] = -1
    with pytest.raises(
        UserError, match="372 tokens are too few to fit 96 inputs by least squares, at least 384 are needed"
    ):
        run_cut(tmp_path / "few", tiny_models["nemotron"], config, tokens, groups)
    config = configuration(refit=Refit.all, held_out_fraction=0.25)
    with pytest.raises(UserError, match="288 tokens are too few to fit 96 inputs"):
        run_cut(tmp_path / "held-out", tiny_models["nemotron"], config, TOKENS, groups)


@pytest.mark.parametrize(
    ("calibration", "prune", "message"),
    [
        ({"num_samples": 2, "seq_length": 100}, {"refit": Refit.outputs}, "200 tokens are too few to fit 96 inputs"),
        ({"seq_length": 100}, {"refit": Refit.all, "repair_tokens": 300}, "300 tokens are too few to fit 96 inputs"),
        ({}, {"drop_layers": [7]}, r"prune\.drop_layers=\[7\]"),
    ],
)
def test_refusals_come_before_scoring(tiny_models, calibration, prune, message):
    config = configuration(**prune)
    config.calibration = dataclasses.replace(config.calibration, **calibration)
    teacher = hf.HFFolder(tiny_models["nemotron"]).shape
    with pytest.raises(UserError, match=message):
        check_request(teacher, teacher.smaller(hidden_size=48), config.prune, config.calibration)


def test_tokens_outside_the_vocabulary(tiny_models, groups, tmp_path):
    with pytest.raises(UserError, match="token 128 is outside the vocabulary of 128 entries"):
        score_checkpoint(
            configuration(),
            groups,
            teacher=hf.HFFolder(tiny_models["nemotron"]),
            tokens=torch.full((1, 2, 8), 128),
            folder=tmp_path,
        )


@pytest.mark.parametrize(("gib", "processes", "kept"), [(8.0, 1, True), (3.0, 1, False), (8.0, 8, False)])
def test_layers_stay_in_memory_only_where_the_container_lets_them(
    tiny_models, groups, monkeypatch, gib, processes, kept
):
    """A quarter of the machine's free memory is not a quarter of the container's, which its processes share."""
    shape = dataclasses.replace(
        hf.HFFolder(tiny_models["llama"]).shape, hidden_size=4096, ffn_hidden_size=8192, num_layers=4
    )
    monkeypatch.setattr(scoring, "memory_here", lambda cuda: int(gib * 2**30))
    monkeypatch.setattr(scoring, "read_world", lambda: World(size=16, local_size=processes))
    assert scoring.fits(shape, groups, torch.float32) == kept


def test_least_squares_of_a_dead_input_keep_the_weights(groups) -> None:
    """A whole layer of neurons may answer nothing but zeros."""
    start_OI = torch.randn(3, 4)
    squares = LeastSquares(4, 3, groups)
    squares.add(torch.zeros(5, 4), torch.randn(5, 3), torch.ones(5))
    assert torch.equal(squares.solve(start_OI, ridge=0.03), start_OI)


def test_least_squares_of_numbers_that_are_none_are_one_line(groups) -> None:
    for x, y in ((torch.nan, 1.0), (1.0, torch.inf)):
        squares = LeastSquares(4, 3, groups)
        squares.add(torch.full((5, 4), x), torch.full((5, 3), y), torch.ones(5))
        with pytest.raises(UserError, match=r"prune\.refit: the model's activations are NaN or infinite"):
            squares.solve(torch.randn(3, 4), ridge=0.03)
