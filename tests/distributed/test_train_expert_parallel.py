"""Training with split experts: losses, checkpoints and exported weights are those of one process."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.config import Recompute
from tests.support.helpers import run_ranks
from tests.support.models import EXPERTS
from tests.support.training import (
    SEQ_LENGTH,
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

SPLIT: dict[str, Any] = {"parallel__expert_model_parallel_size": 2}
PLAIN: dict[str, Any] = {"data__validation_tokens": 7 * SEQ_LENGTH}  # one of two ranks has a row less


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    keys = EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40}
    return make_material(tmp_path_factory.mktemp("experts"), "llama_untied", **keys)


@pytest.fixture(scope="module")
def one_rank(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of one process: a whole run, and one that stops in step 5."""
    root = tmp_path_factory.mktemp("one")
    run(material, root / "whole", **PLAIN)
    with before_step(5, interrupt), pytest.raises(Interrupted):
        run(material, root / "half", **PLAIN)
    return root


def test_two_ranks_train_like_one(material: Material, one_rank: Path, tmp_path: Path) -> None:
    """A run goes from one rank to two that share the experts, another one from two to one, and one is resumed on two."""
    widened, narrowed, resumed = (tmp_path / name for name in ("widened", "narrowed", "resumed"))
    shutil.copytree(one_rank / "half", widened)
    run_ranks(
        train_here,
        2,
        [
            (material, widened, PLAIN | SPLIT),
            (material, narrowed, PLAIN | SPLIT | {"stop_in": 5, "train__distributed_optimizer": False}),
            (material, resumed, PLAIN | SPLIT | {"stop_in": 5}),
            (material, resumed, PLAIN | SPLIT | {"train__recompute": Recompute.full}),
        ],
    )
    run(material, narrowed, **PLAIN)
    for folder in (widened, narrowed, resumed):
        assert_equal(folder, rows(one_rank / "whole"))
    wanted = student_of(one_rank / "whole", tmp_path / "exported")
    weights = student_of(widened, tmp_path / "exported_widened")
    assert set(weights) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4)


def test_four_ranks_train_like_one(material: Material, one_rank: Path, tmp_path: Path) -> None:
    """Two ranks hold the same experts, or two ranks share each expert's neurons; one checkpoint goes through both."""
    both = PLAIN | SPLIT | {"parallel__tensor_model_parallel_size": 2}
    run_ranks(
        train_here,
        4,
        [
            (material, tmp_path / "plain_dp2_ep2", PLAIN | SPLIT | {"stop_in": 5}),
            (material, tmp_path / "plain_dp2_ep2", both),
        ],
    )
    assert_equal(tmp_path / "plain_dp2_ep2", rows(one_rank / "whole"))
