"""Training of experts: layouts agree, checkpoints change layout, load balancing, and the student in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train import hf
from minitron_train.config import Recompute
from minitron_train.model.experts import balance_loss
from tests.support.helpers import run_ranks
from tests.support.models import EXPERTS, hf_logits
from tests.support.training import (
    Interrupted,
    Material,
    assert_equal,
    before_step,
    interrupt,
    make_material,
    rows,
    run,
    student_of,
    train_here,
)

SPLIT = {"parallel__tensor_model_parallel_size": 2}
BALANCED: dict[str, Any] = {"train__router_aux_loss": 0.5}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("experts"), "llama_untied", model_type="qwen3_moe", **EXPERTS)


@pytest.fixture(scope="module")
def one_rank(experts: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of one process, without and with the load-balancing loss."""
    root = tmp_path_factory.mktemp("one")
    run(experts, root / "plain")
    run(experts, root / "balanced", **BALANCED)
    return root


def test_layouts_agree_and_checkpoints_change_layout(experts: Material, one_rank: Path, tmp_path: Path) -> None:
    split = tmp_path / "plain_1_to_2"
    with before_step(5, interrupt), pytest.raises(Interrupted):
        run(experts, split)
    run_ranks(
        train_here,
        2,
        [
            (experts, tmp_path / "plain_tp2", SPLIT),
            (experts, tmp_path / "balanced_tp2_sp", SPLIT | BALANCED | {"parallel__sequence_parallel": True}),
            (experts, tmp_path / "plain_dp2", {}),
            (experts, split, SPLIT),
        ],
    )
    for folder in tmp_path.iterdir():
        assert_equal(folder, rows(one_rank / folder.name.split("_")[0]))
    weights = student_of(split, tmp_path / "exported")
    for name, tensor in student_of(one_rank / "plain", tmp_path / "exported_1").items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.selective])
def test_recomputation_changes_nothing(experts: Material, one_rank: Path, tmp_path: Path, recompute: Recompute) -> None:
    run(experts, tmp_path, **BALANCED, train__recompute=recompute)
    assert_equal(tmp_path, rows(one_rank / "balanced"), tolerance=1e-6)


def test_the_student_learns_and_opens_in_transformers(experts: Material, one_rank: Path, tmp_path: Path) -> None:
    logged = rows(one_rank / "plain")
    assert logged[-1]["kd_loss"] < 0.95 * logged[0]["kd_loss"]
    student_of(one_rank / "plain", tmp_path / "student")
    assert hf.HFFolder(tmp_path / "student").shape == hf.HFFolder(experts.student).shape
    tokens = torch.arange(34).view(2, 17)
    assert not torch.equal(hf_logits(tmp_path / "student", tokens), hf_logits(experts.student, tokens))


def loads(folder: Path) -> float:
    """The load-balancing loss of the first layer of transformers' model."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        model(torch.arange(320)[None, :96])
    logits, _, index = found[0]
    return float(balance_loss(logits.softmax(-1), index))


def test_balancing_evens_the_loads(one_rank: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for name in ("plain", "balanced"):
        student_of(one_rank / name, tmp_path / name)
        found[name] = loads(tmp_path / name)
    assert 1 <= found["balanced"] < found["plain"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """The student's second layer and the teacher's are dense."""
    keys = EXPERTS | {"model_type": "qwen3_moe", "mlp_only_layers": [1], "intermediate_size": 40}
    return make_material(tmp_path_factory.mktemp("mixed"), "llama_untied", **keys)


def test_layers_of_two_sizes_are_saved_one_by_one(mixed: Material, tmp_path: Path) -> None:
    """A checkpoint, whose layers have tensors of their own, is resumed and exported, and transformers opens the student."""
    run(mixed, tmp_path / "whole")
    with before_step(5, interrupt), pytest.raises(Interrupted):
        run(mixed, tmp_path / "resumed")
    run(mixed, tmp_path / "resumed")
    assert_equal(tmp_path / "resumed", rows(tmp_path / "whole"), tolerance=1e-6)
    weights = student_of(tmp_path / "resumed", tmp_path / "student")
    for name, tensor in student_of(tmp_path / "whole", tmp_path / "other").items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    assert hf.HFFolder(tmp_path / "student").shape == hf.HFFolder(mixed.student).shape
    tokens = torch.arange(34).view(2, 17)
    assert not torch.equal(hf_logits(tmp_path / "student", tokens), hf_logits(mixed.student, tokens))


def test_layers_of_two_sizes_are_split(mixed: Material, tmp_path: Path) -> None:
    run(mixed, tmp_path / "one")
    run_ranks(train_here, 2, [(mixed, tmp_path / "two", SPLIT)])
    assert_equal(tmp_path / "two", rows(tmp_path / "one"))
