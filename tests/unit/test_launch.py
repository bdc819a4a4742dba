"""Ranks from torchrun and srun; each process takes its share of the cores."""

import os
from pathlib import Path

import pytest

from minitron_train.commands import slurm
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World, check_hub_variables, own_cores, read_world, rendezvous, share_cores
from minitron_train.stages import run as stages


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


STEP = {"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "112"}


@pytest.mark.parametrize(
    ("environ", "num_usable", "num_own"),
    [
        ({}, 112, 14),
        ({"SLURM_CPUS_PER_TASK": "112"}, 112, 14),  # in a batch script, not in a step
        (STEP, 14, 14),  # srun has bound the tasks
        (STEP, 112, 14),  # it has not
        (STEP | {"SLURM_CPUS_ON_NODE": "56"}, 56, 7),  # half the node, and nothing else can be used
        (STEP | {"SLURM_CPUS_ON_NODE": "56"}, 112, 7),
        (STEP | {"SLURM_CPUS_ON_NODE": "4"}, 4, 1),
        (STEP | {"SLURM_CPUS_PER_TASK": "14"}, 14, 14),
        (STEP | {"SLURM_CPUS_PER_TASK": "12"}, 112, 12),
        (STEP | {"SLURM_CPUS_PER_TASK": "112"}, 14, 14),  # the batch script's
        (STEP | {"SLURM_CPUS_PER_TASK": "112", "RANK": "3", "WORLD_SIZE": "8"}, 112, 14),  # torchrun in a step
    ],
)
def test_what_srun_has_shared_is_not_shared_again(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], num_usable: int, num_own: int
) -> None:
    """Eight processes on a node of 112 cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 112)
    assert own_cores(World(3, 8, 3, 8), environ, num_usable) == num_own


def test_threads_of_a_bound_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in STEP.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 112)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(14)))
    share_cores(World(3, 8, 3, 8))
    assert os.environ["OMP_NUM_THREADS"] == "14"


def test_an_address_that_ends_the_hubs_import_is_refused_before_it() -> None:
    check_hub_variables({"HF_ENDPOINT": "https://mirror.example"})
    with pytest.raises(UserError, match=r"HF_ENDPOINT='http://\[': is not an address .*; correct or unset it"):
        check_hub_variables({"HF_ENDPOINT": "http://["})


STEP_OF_FOUR = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
ODD = ("x", "-1", "1e3", "0x10", "²", "١", "9" * 5000, "4.0", "None", "\n", "1 2")


@pytest.mark.parametrize("value", ODD)
def test_values_that_are_no_numbers_are_one_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stages.Stage(name="x", folder=Path("nowhere"), inputs={}, settings={})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name, read in {
        "RANK": lambda: read_world({"RANK": value, "WORLD_SIZE": "2"}),
        "WORLD_SIZE": lambda: read_world({"RANK": "0", "WORLD_SIZE": value}),
        "SLURM_PROCID": lambda: read_world({**STEP_OF_FOUR, "SLURM_PROCID": value}),
        "SLURM_STEP_NUM_TASKS": lambda: read_world({**STEP_OF_FOUR, "SLURM_STEP_NUM_TASKS": value}),
        "SLURM_CPUS_PER_TASK": lambda: own_cores(World(), {**STEP, "SLURM_CPUS_PER_TASK": value}, 8),
        "SLURM_CPUS_ON_NODE": lambda: own_cores(World(), {**STEP, "SLURM_CPUS_ON_NODE": value}, 8),
        "SLURM_GPUS_ON_NODE": lambda: list(slurm.gpu_complaints({"SLURM_GPUS_ON_NODE": value}, World())),
        "SLURM_GPUS_PER_TASK": lambda: list(slurm.gpu_complaints({"SLURM_GPUS_PER_TASK": f"h100:{value}"}, World())),
        "MASTER_PORT": lambda: rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": value}),
        "HF_HUB_ETAG_TIMEOUT": lambda: check_hub_variables({"HF_HUB_ETAG_TIMEOUT": value}),
        "HF_HUB_DOWNLOAD_TIMEOUT": lambda: check_hub_variables({"HF_HUB_DOWNLOAD_TIMEOUT": value}),
        "OMP_NUM_THREADS": lambda: share_cores(World()),
        "SLURM_RESTART_COUNT": lambda: stages.begun_before_requeue(stage),
    }.items():
        if not value.strip() and name not in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "MASTER_PORT"):
            continue  # counts as unset
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=name) as caught:
            read()
        monkeypatch.delenv(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
