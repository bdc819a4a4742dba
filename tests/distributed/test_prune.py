"""Scores, kept indices and repaired weights are the same on any number of ranks."""

from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

from minitron_train.config import ParallelConfig, Refit
from minitron_train.parallel.groups import Groups
from minitron_train.pruning import prune
from minitron_train.runtime.launch import read_world
from tests.support.helpers import run_ranks
from tests.support.models import COMMON, EXPERTS, hf_logits, save_random
from tests.support.pruning import configuration, random_tokens, run_cut

FAMILY = "nemotron"


def prune_on(rank: int, world_size: int, tp: int, teacher: Path, folder: Path, rotate: bool = False) -> None:
    """Score, cut and repair with `tp` ranks per model copy."""
    from minitron_train.parallel.groups import start

    with start(ParallelConfig(tensor_model_parallel_size=tp), read_world(), seed=1) as groups:
        tokens = random_tokens(sequences=8)
        sizes = {"hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 4}
        settings = {"depth": "perplexity", "rotate": rotate, "norm_scale": rotate, "held_out_fraction": 0.125}
        config = configuration(refit=Refit.all, **settings)
        run_cut(folder, teacher, config, tokens, groups, **sizes)


def results(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Scores, kept indices, weights."""
    return [
        load_file(folder / file)
        for file in ("scores.safetensors", "pruned/kept.safetensors", "pruned/model.safetensors")
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(prune_on, 1, 1, tiny_models[FAMILY], folder)
    return results(folder)


def test_a_rank_makes_no_group_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(prune.dist, "new_group", lambda ranks, **_: made.append(ranks) or "alone")
    group, device = MagicMock(), torch.device("cpu")
    groups = Groups(2, 4, 0, 2, 1, 2, group, group, device, group, group)
    whole = prune.whole_layers(groups)
    assert prune.whole_layers(groups) is whole
    assert (whole.tp_group, whole.tp_size, whole.dp_rank, whole.dp_size) == ("alone", 1, 2, 4)
    assert made == [[2]]


@pytest.mark.parametrize(("world_size", "tp"), [(4, 4), (4, 2)])
def test_ranks_agree_with_one(tmp_path, tiny_models, alone, world_size, tp):
    run_ranks(prune_on, world_size, tp, tiny_models[FAMILY], tmp_path)
    agree(alone, results(tmp_path))


def test_ranks_agree_about_experts(tmp_path):
    config = COMMON | EXPERTS | {"model_type": "qwen3_moe", "num_hidden_layers": 2}
    teacher, found = save_random(config, tmp_path / "teacher"), []
    for world_size, tp in ((1, 1), (4, 2)):
        folder = tmp_path / str(world_size)
        run_ranks(cut_experts_on, world_size, tp, teacher, folder)
        found.append(results(folder))
    agree(*found)


def cut_experts_on(rank: int, world_size: int, tp: int, teacher: Path, folder: Path) -> None:
    """Score, cut and repair a mixture of experts with `tp` ranks per model copy."""
    from minitron_train.parallel.groups import start

    with start(ParallelConfig(tensor_model_parallel_size=tp), read_world(), seed=1) as groups:
        sizes = {"num_moe_experts": 4, "ffn_hidden_size": 16}
        run_cut(folder, teacher, configuration(refit=Refit.all), random_tokens(sequences=8), groups, **sizes)


def agree(one, other):
    """Assert that two runs found the same scores, indices and weights."""
    (scores, kept, weights), (other_scores, other_kept, other_weights) = one, other
    for name, tensor in scores.items():
        exact = not name.startswith("raw.") or name in ("raw.losses_without", "raw.logit_changes")
        rtol = 1e-5 if exact else 1e-3  # raw holds variances of variances
        torch.testing.assert_close(
            other_scores[name], tensor, rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, tensor in kept.items():
        torch.testing.assert_close(other_kept[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for name, tensor in weights.items():
        torch.testing.assert_close(
            other_weights[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def repair_on(rank: int, world_size: int, teacher: Path, folder: Path) -> None:
    """Rescale the norms of a rotated student from one sequence."""
    from minitron_train.parallel.groups import start

    with start(ParallelConfig(), read_world(), seed=1) as groups:
        config = configuration(rotate=True, norm_scale=True, repair_tokens=32)
        run_cut(folder, teacher, config, random_tokens(length=32), groups, hidden_size=48)


def test_a_repair_uses_no_more_tokens_on_more_ranks(tmp_path, tiny_models):
    """One sequence for two ranks: the second one has none."""
    found = []
    for world_size in (1, 2):
        run_ranks(repair_on, world_size, tiny_models["llama_untied"], tmp_path / str(world_size))
        found.append(hf_logits(tmp_path / str(world_size) / "pruned", random_tokens()[0]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["nemotron", "llama_untied"])
def test_a_rotated_student_is_the_same_model_on_any_ranks(tmp_path, tiny_models, family):
    """Directions of nearly equal variance may mix, so that weights differ; what the model says does not."""
    found = []
    for world_size, tp in ((1, 1), (4, 2)):
        folder = tmp_path / str(world_size)
        run_ranks(prune_on, world_size, tp, tiny_models[family], folder, True)
        found.append(hf_logits(folder / "pruned", random_tokens()[0]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-2)


def write_on(rank: int, world_size: int, tp: int, teacher: Path) -> list[list[int]]:
    """What the teacher writes, as this rank has it."""
    from minitron_train import hf
    from minitron_train.config import CalibrationConfig
    from minitron_train.parallel.groups import start
    from minitron_train.pruning import samples

    samples.MOST_AT_ONCE = 4
    with start(ParallelConfig(tensor_model_parallel_size=tp), read_world(), seed=1) as groups:
        texts_NS = samples.generate_samples(
            CalibrationConfig(seq_length=16), groups, hf.HFFolder(teacher), [3, 7], 10, seed=1
        )
        return texts_NS.tolist()


def test_the_teacher_writes_the_same_on_any_ranks(tiny_models):
    [expected] = run_ranks(write_on, 1, 1, tiny_models[FAMILY])
    for found in run_ranks(write_on, 4, 2, tiny_models[FAMILY]):
        assert found == expected
