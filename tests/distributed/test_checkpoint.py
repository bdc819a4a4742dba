"""Checkpoints of several ranks: each saves its share, any layout resumes, what rank 0 cannot write costs one checkpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_train.arch import Shape
from minitron_train.config import CheckpointConfig, ParallelConfig, Precision, TrainConfig
from minitron_train.planning.memory import Layout, saved_bytes
from minitron_train.train import checkpoint_files as files
from tests.support.helpers import run_ranks
from tests.support.training import (
    SEQ_LENGTH,
    Material,
    assert_equal,
    differences,
    former_state,
    make_material,
    rows,
    run,
    student_of,
    train_here,
)

IN_THE_WAY = {2: ".metadata.tmp", 3: "metadata.json"}  # by step; a folder of this name is refused as a full disk is
TEN_STEPS = {"train__num_tokens": 10 * 8 * SEQ_LENGTH}
SPLIT = {"parallel__tensor_model_parallel_size": 2}
BF16 = {"train__precision": Precision.bf16}
WHOLE = {"train__distributed_optimizer": False}
SHAPE = Shape(
    architecture="llama",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=2048,
)


def save_four(rank: int, world_size: int, folder: Path) -> list[bool]:
    """Which of four checkpoints could be written."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import read_world
    from minitron_train.train.best import BestMetric
    from minitron_train.train.checkpoint import CheckpointManager

    with start(ParallelConfig(timeout_minutes=0.5), read_world(), seed=1) as groups:
        checkpoints = CheckpointManager(folder, CheckpointConfig(keep=9), groups, BestMetric("validation.kl"), {})
        weight = ShardedTensor.from_rank_offsets("weight", torch.ones(4), (0, rank, world_size))
        good = []
        for step in range(1, 5):
            checkpoints.save(step, {"weight": weight, "run": {"step": step}}, {})
            assert checkpoints.writing is not None
            if rank == 0 and step in IN_THE_WAY:
                (checkpoints.writing.folder / IN_THE_WAY[step]).mkdir()
            good.append(checkpoints.poll(wait=True))
        return good


def test_a_full_disk_on_the_first_rank_costs_one_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(save_four, 2, tmp_path) == [[True, False, False, True]] * 2
    assert [path.name for path in files.finished(tmp_path)] == ["step_00000004", "step_00000001"]
    assert not list(tmp_path.glob("*.partial*"))


class Received(TorchDispatchMode):
    """Counts the bytes that collectives deliver to this rank, pickled objects included."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = torch.utils._pytree.tree_leaves(args[0])
            self.bytes += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(target: Any, name: str, size: Any) -> Iterator[list[int]]:
    """Append size(arguments, result) of every call of a function to the yielded list."""
    sizes: list[int] = []
    original = getattr(target, name)

    def counting(*args: Any) -> Any:
        result = original(*args)
        sizes.append(size(args, result))
        return result

    with mock.patch.object(target, name, counting):
        yield sizes


def count_bytes(rank: int, world_size: int, folder: Path, sharded: bool) -> dict[str, int]:
    """Bytes of this rank while it saves and loads a checkpoint."""
    from minitron_train.model.build import build
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import read_world
    from minitron_train.train import checkpoint, safe_load
    from minitron_train.train.best import BestMetric
    from minitron_train.train.optim import Optimizer, student_arguments

    train = TrainConfig(precision=Precision.bf16, distributed_optimizer=sharded)
    with start(ParallelConfig(), read_world(), seed=1) as groups:
        optimizer = Optimizer(student := build(SHAPE, **student_arguments(train)), train)
        manager = checkpoint.CheckpointManager(
            folder, CheckpointConfig(), groups, BestMetric("validation.kl"), {"settings": 1}
        )
        with (
            Received() as sent,
            counted(checkpoint, "copy_to_host", lambda _, copy: sum(tensor.nbytes for _, tensor in copy[2][1])) as host,
        ):
            state = optimizer.state_to_save(student.sharded_state_dict())
            assert manager.save(1, state | {"run": {}}, {}, wait=True)
        written = sum(file.stat().st_size for file in files.finished(folder)[0].glob(f"__{rank}_*.distcp"))
        with (
            Received() as back,
            counted(safe_load.SafeReader, "read_data", lambda args, _: requested_bytes(args[1])) as read,
        ):
            assert manager.load(optimizer.state_to_load(student.sharded_state_dict())) is not None
        weights = sum(parameter.nbytes for parameter in student.parameters())
        return {
            "weights": weights,
            "host": sum(host),
            "written": written,
            "received": sent.bytes,
            "read": sum(read),
            "received_in_load": back.bytes,
        }


def requested_bytes(plan: Any) -> int:
    """Bytes of the tensors that a rank reads; fp32 state has four a number, bf16 weights two."""
    widths = [4 if item.dest_index.fqn.startswith("optimizer.") else 2 for item in plan.items]
    return sum(prod(item.lengths) * width for item, width in zip(plan.items, widths, strict=True))


@pytest.mark.parametrize("sharded", [True, False])
def test_no_rank_holds_more_than_its_share(tmp_path: Path, sharded: bool) -> None:
    """Each of four ranks copies, writes and reads about a quarter. A save sends only descriptions, a load only weights."""
    ranks = run_ranks(count_bytes, 4, tmp_path, sharded)
    weights = ranks[0]["weights"]
    total = weights + weights // 2 * 12  # bf16 weights, fp32 master weights and moments
    assert sum(rank["host"] for rank in ranks) == total
    planned = saved_bytes(SHAPE, Layout(dp=4, micro_batch_size=1, seq_length=1, weight_bytes=2, teacher_weight_bytes=2))
    for rank in ranks:
        assert rank["host"] == pytest.approx(planned, rel=0.01)
        assert rank["written"] < 1.3 * total / 4
        assert rank["received"] < 0.05 * total / 4
        assert rank["read"] < 1.3 * total / 4
        assert rank["received_in_load"] < (weights if sharded else total) + 0.1 * total / 4


def train_formerly(rank: int, world_size: int, former: list[Any], now: list[Any]) -> None:
    """Several runs, of which the first save in the format of earlier checkpoints."""
    with mock.patch("minitron_train.train.optim.Optimizer.state_to_save", former_state):
        train_here(rank, world_size, former)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the last run's store still listens
    train_here(rank, world_size, now)


def test_two_ranks_with_a_sharded_optimizer(training: Material, tmp_path: Path) -> None:
    """It trains as an unsharded one does, resumes bit-equal, on one rank too, and from earlier checkpoints."""
    sharded, whole, bf16, resumed, alone = (
        tmp_path / name for name in ("sharded", "whole", "bf16", "resumed", "alone")
    )
    old_sharded, old_whole = tmp_path / "old_sharded", tmp_path / "old_whole"
    stop = {"stop_in": 5}
    former = [(training, old_sharded, TEN_STEPS | BF16 | stop), (training, old_whole, TEN_STEPS | WHOLE | stop)]
    now = [
        (training, sharded, TEN_STEPS),
        (training, whole, TEN_STEPS | WHOLE),
        (training, bf16, TEN_STEPS | BF16),
        (training, resumed, TEN_STEPS | BF16 | stop),
        (training, resumed, TEN_STEPS | BF16),
        (training, alone, TEN_STEPS | stop),
        (training, old_sharded, TEN_STEPS | BF16),
        (training, old_whole, TEN_STEPS),
    ]
    run_ranks(train_formerly, 2, former, now)
    assert differences(sharded, rows(whole))["loss"] < 1e-6
    assert rows(resumed) == rows(old_sharded) == rows(bf16)
    assert_equal(old_whole, rows(sharded))
    assert run(training, alone, **TEN_STEPS)["resumed_at_step"] == 3
    assert_equal(alone, rows(sharded))


def test_four_ranks_change_their_layout(tmp_path: Path) -> None:
    """DP 4 resumes bit-equal, then as TP 2 x DP 2; TP 2 x DP 2 resumes as DP 4. The model has a gated MLP."""
    material = make_material(tmp_path, "llama")
    whole, split, joined = (tmp_path / name for name in ("whole", "split", "joined"))
    runs = [
        (material, whole, {}),
        (material, split, {"stop_in": 5}),
        (material, split, {"stop_in": 8}),
        (material, split, SPLIT),
        (material, joined, SPLIT | {"stop_in": 5}),
        (material, joined, {}),
    ]
    run_ranks(train_here, 4, runs)
    assert rows(split)[:6] == rows(whole)[:6]
    assert_equal(split, rows(whole))
    assert_equal(joined, rows(whole))
    exported = {folder: student_of(folder, tmp_path / f"{folder.name}_exported") for folder in (whole, split)}
    for name, tensor in exported[whole].items():
        assert torch.allclose(exported[split][name], tensor, rtol=1e-4, atol=1e-5), name
