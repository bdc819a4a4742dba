"""Training over pipeline stages gives what one rank gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.arch.pipeline import stage_layers
from minitron_train.config import Recompute
from minitron_train.runtime.errors import UserError
from minitron_train.train.settings import check_settings
from tests.support.helpers import run_ranks
from tests.support.training import (
    SEQ_LENGTH,
    Material,
    assert_equal,
    make_config,
    make_material,
    rows,
    run,
    student_of,
    train_here,
)

TEN_STEPS: dict[str, Any] = {"train__num_tokens": 10 * 8 * SEQ_LENGTH, "eval__every_tokens": 4 * 8 * SEQ_LENGTH}
STAGES = TEN_STEPS | {"parallel__pipeline_model_parallel_size": 2}
LABELS: dict[str, Any] = {"distill__ce_weight": 0.5}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("tied"), "llama")


def assert_same_student(folder: Path, other: Path, scratch: Path) -> None:
    """The exported weights are equal but for rounding."""
    found, wanted = (student_of(run_, scratch / f"{run_.name}_exported") for run_ in (folder, other))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), name


def test_two_stages_train_as_one_rank(training: Material, tied: Material, tmp_path: Path) -> None:
    """Teachers of three layers (two on the first stage), students of two; untied, and tied with labels in the loss."""
    run_ranks(
        train_here,
        2,
        [(training, tmp_path / "untied_staged", STAGES), (tied, tmp_path / "tied_staged", STAGES | LABELS)],
    )
    run(training, tmp_path / "untied", **TEN_STEPS)
    run(tied, tmp_path / "tied", **TEN_STEPS | LABELS)
    for name in ("untied", "tied"):
        assert_equal(tmp_path / f"{name}_staged", rows(tmp_path / name))
        assert_same_student(tmp_path / f"{name}_staged", tmp_path / name, tmp_path)


def test_the_last_stage_gets_no_layer_of_the_rest() -> None:
    assert [len(layers) for layers in stage_layers(8, 4)] == [2, 2, 2, 2]
    assert [len(layers) for layers in stage_layers(10, 4)] == [2, 3, 3, 2]
    assert stage_layers(3, 2) == [range(2), range(2, 3)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"distill__hidden_layers": ["1/2"]}, "distill.hidden_layers"),
        ({"eval__training_tasks": ["hellaswag"], "eval__every_tokens": 1024}, "eval.training_tasks"),
        ({"train__router_aux_loss": 0.1, "train__recompute": Recompute.selective}, "train.recompute=selective"),
    ],
)
def test_settings_that_stages_lack_are_refused(settings: dict[str, Any], named: str) -> None:
    material = Material(Path(), Path(), Path())
    check_settings(make_config(material, **settings), distilled=True)
    with pytest.raises(UserError, match=named) as refused:
        check_settings(make_config(material, **STAGES | settings), distilled=True)
    assert "parallel.pipeline_model_parallel_size=2" in str(refused.value)


@pytest.mark.parametrize(("stages", "reason"), [(2, "must divide the number of processes, 1"), (3, "student has only")])
def test_numbers_of_stages_are_refused(training: Material, tmp_path: Path, stages: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        run(training, tmp_path, parallel__pipeline_model_parallel_size=stages)
