"""Expert parallelism: logits and gradients are those of one process."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_train.arch.convert import shards_to_parts
from minitron_train.config import ParallelConfig
from minitron_train.hf import HFFolder
from minitron_train.model.experts import set_balance_weight
from minitron_train.model.load import places
from minitron_train.planning.counts import parameters_per_rank
from minitron_train.runtime.launch import read_world
from tests.support.helpers import run_ranks
from tests.support.models import COMMON, EXPERTS, opened, save_random

TOKENS_BS = torch.arange(4 * 16).view(4, 16) * 7 % 128  # one row for each data-parallel rank
BALANCE = 1e4  # weight of the load-balancing loss of each row, so that it changes the gradients

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
            set_balance_weight(model, BALANCE)
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
        set_balance_weight(model, BALANCE)
        logits = [model.logits(model(row[None]))[:, 0] for row in TOKENS_BS[:num_rows]]
        torch.stack(logits).square().sum().backward()
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
