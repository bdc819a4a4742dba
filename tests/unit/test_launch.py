"""Ranks from torchrun and srun; each process takes its share of the cores."""

import os

import pytest

from minitron_train.parallel.launch import World, read_world, share_cores


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 8, 1, 2)),
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
            World(1, 4, 1, 2),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, World()),  # inside a batch script, not in a step
    ],
)
def test_world(environ: dict[str, str], world: World) -> None:
    assert read_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, str(max(1, len(os.sched_getaffinity(0)) // 2))),
        ({"OMP_NUM_THREADS": "7"}, "7"),
        ({"OMP_NUM_THREADS": "7", "TORCHELASTIC_RUN_ID": "none"}, "7"),
    ],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], threads: str) -> None:
    for key in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    share_cores(World(0, 2, 0, 2))
    assert os.environ["OMP_NUM_THREADS"] == threads
