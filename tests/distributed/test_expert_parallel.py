"""Expert parallelism: logits, gradients, training and checkpoints are those of one process."""

import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_train.arch.convert import shards_to_parts
from minitron_train.config import ParallelConfig, Recompute
from minitron_train.hf import HFFolder
from minitron_train.model.load import places
from minitron_train.planning.counts import parameters_per_rank
from minitron_train.runtime.launch import read_world
from tests.support.helpers import run_ranks
from tests.support.models import COMMON, EXPERTS, opened, save_random
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

TOKENS_BS = torch.arange(4 * 16).view(4, 16) * 7 % 128  # one row for each data-parallel rank
SPLIT: dict[str, Any] = {"parallel__expert_model_parallel_size": 2}
PLAIN: dict[str, Any] = {"data__validation_tokens": 7 * SEQ_LENGTH}  # one of two ranks has a row less

Arrays = dict[str, numpy.ndarray]


def split_models(rank: int, world_size: int, folders: list[Path], layout: dict[str, Any]) -> list[tuple[int, Arrays]]:
    """Of each folder: this rank's row, its logits [S, V], and the gradients of the sum over all rows, as exported."""
    from minitron_train.model.build import build
    from minitron_train.model.load import share_weights
    from minitron_train.parallel.groups import start

    found = []
    with start(ParallelConfig(**layout), read_world(), seed=1) as groups:
        for folder in folders:
            files = HFFolder(folder)
            experts = groups.own_experts(files.shape.num_moe_experts)
            model = build(files.shape, tp=groups.tp_size, ep=groups.ep_size)
            share_weights(model, files.table, files.shape, files, groups)
            count = sum(parameter.numel() for parameter in model.parameters())
            assert count == parameters_per_rank(files.shape, groups.tp_size, groups.ep_size)
            logits = model.logits(model(TOKENS_BS[groups.dp_rank, None]))
            logits.square().sum().backward()
            given = {"logits": torch.cat(groups.gather(logits.detach()), dim=-1)[:, 0]}
            for parameter, row, i in places(model, files.table, files.shape, experts):
                is_split = row.expert is not None and groups.ep_size > 1
                assert is_split != getattr(parameter, "allreduce", True)
                gradient = parameter.grad
                assert gradient is not None
                torch.distributed.all_reduce(gradient, group=groups.edp_group if is_split else groups.dp_group)
                parts = shards_to_parts(row, files.shape, groups.gather(gradient))
                given |= {name.format(i=i): part for name, part in parts.items()}
            found.append((groups.dp_rank, {name: tensor.numpy().copy() for name, tensor in given.items()}))
    return found


@pytest.mark.parametrize(
    ("world_size", "layout", "families"),
    [
        (2, {"expert_model_parallel_size": 2}, ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"]),
        (4, {"expert_model_parallel_size": 2}, ["qwen3_moe"]),
        # megatron-core sums the gradients of norms over one head later, so Mixtral, which has none
        (4, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}, ["mixtral", "qwen2_moe"]),
    ],
)
def test_logits_and_gradients_are_those_of_one_process(
    tmp_path: Path, groups: Any, world_size: int, layout: dict[str, Any], families: list[str]
) -> None:
    keys = COMMON | EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 40}
    folders = [save_random({**keys, "model_type": name}, tmp_path / name) for name in families]
    answers = run_ranks(split_models, world_size, folders, layout)
    num_rows = world_size // layout.get("tensor_model_parallel_size", 1)
    for k, folder in enumerate(folders):
        files, model = opened(folder)
        model.train()
        logits = model.logits(model(TOKENS_BS[:num_rows])).transpose(0, 1)
        logits.square().sum().backward()
        wanted = {}
        for parameter, row, i in places(model, files.table, files.shape):
            assert parameter.grad is not None
            parts = shards_to_parts(row, files.shape, [parameter.grad])
            wanted |= {name.format(i=i): part for name, part in parts.items()}
        seen = set()
        for row, given in (rank[k] for rank in answers):
            compare(given.pop("logits"), logits[row].detach(), 1e-5)
            for name, gradient in given.items():
                compare(gradient, wanted[name], 1e-4)
            seen |= set(given)
        assert seen == set(wanted)
        assert len(answers[0][k][1]) < len(wanted)  # a rank holds some experts only


def compare(found: numpy.ndarray, wanted: torch.Tensor, tolerance: float) -> None:
    """Assert that an array is equal within `tolerance` x the largest value that is wanted."""
    limit = tolerance * float(wanted.abs().max())
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=limit)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("experts"), "llama_untied", model_type="qwen3_moe", **EXPERTS)


@pytest.fixture(scope="module")
def one_rank(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of one process: a whole run, and one that stops in step 5."""
    root = tmp_path_factory.mktemp("one")
    run(material, root / "whole", **PLAIN)
    with before_step(5, interrupt), pytest.raises(Interrupted):
        run(material, root / "half", **PLAIN)
    return root


def test_two_ranks_train_like_one(material: Material, one_rank: Path, tmp_path: Path) -> None:
    """A run goes from one rank to two that share the experts, another one from two to one."""
    widened, narrowed, whole, resumed = (tmp_path / name for name in ("widened", "narrowed", "whole", "resumed"))
    shutil.copytree(one_rank / "half", widened)
    balanced = PLAIN | {"train__router_aux_loss": 0.5}
    run_ranks(
        train_here,
        2,
        [
            (material, widened, PLAIN | SPLIT),
            (material, narrowed, PLAIN | SPLIT | {"stop_in": 5, "train__distributed_optimizer": False}),
            (material, whole, balanced),
            (material, resumed, balanced | SPLIT | {"stop_in": 5}),
            (material, resumed, balanced | SPLIT | {"train__recompute": Recompute.full}),
        ],
    )
    run(material, narrowed, **PLAIN)
    for folder in (widened, narrowed):
        assert_equal(folder, rows(one_rank / "whole"))
    assert_equal(resumed, rows(whole))
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
