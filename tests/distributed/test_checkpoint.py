"""Checkpoints of two ranks: what rank 0 cannot write costs one checkpoint, and nobody waits for it."""

from pathlib import Path

import torch

from minitron_train.config import CheckpointConfig, ParallelConfig
from minitron_train.train import checkpoint_files as files
from tests.support.helpers import run_ranks

IN_THE_WAY = {2: ".metadata.tmp", 3: "metadata.json"}  # by step; a folder of this name is refused as a full disk is


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
