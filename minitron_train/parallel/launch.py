"""Who started this process, and its share of the machine. No torch here: it runs before torch is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from minitron_train.errors import UserError

Environ = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class World:
    """Rank and size as torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS) give them; alone otherwise."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def under_torchrun(environ: Environ) -> bool:
    """Whether torchrun, or what sets its variables, has started this process: its word counts before Slurm's."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def read_world(environ: Environ = os.environ) -> World:
    """The world from the environment. An srun task counts only inside a job step (SLURM_STEP_ID) of several tasks."""
    if under_torchrun(environ):
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return World()
    found = [environ.get(key, default).split("(")[0].split(",")[0] for key, default in zip(keys, "0101", strict=True)]
    given = ", ".join(f"{key}={value}" for key, value in zip(keys, found, strict=True))
    if not all(value.isdecimal() for value in found) or int(found[0]) >= int(found[1]):
        raise UserError(f"{given}: must be whole numbers, a rank below its world's size; start with torchrun or srun")
    return World(*map(int, found))


def share_cores(world: World) -> None:
    """Give each process of this machine its own share of the cores as threads, unless the user has decided.

    torchrun sets OMP_NUM_THREADS=1 by itself when it is unset; it marks that by nothing, so under torchrun the
    variable counts as the user's only when it is not 1.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is None or ("TORCHELASTIC_RUN_ID" in os.environ and chosen == "1"):
        os.environ["OMP_NUM_THREADS"] = str(own_cores(world, os.environ, len(os.sched_getaffinity(0))))


def own_cores(world: World, environ: Environ, num_usable: int) -> int:
    """This process's share of the cores that it may use. Those that srun has bound it to are its own already.

    Example: 8 tasks on 112 cores have 14 each, where each may use its 14 and where each may use all 112.
    """
    if under_torchrun(environ) or "SLURM_STEP_ID" not in environ:
        return max(1, num_usable // world.local_size)
    if "SLURM_CPUS_PER_TASK" in environ:
        return min(num_usable, int(environ["SLURM_CPUS_PER_TASK"]))  # it may be the batch script's, not the step's
    num_here = os.cpu_count() or 1
    num_of_job = min(num_here, int(environ.get("SLURM_CPUS_ON_NODE", num_here)))
    return num_usable if num_usable < num_of_job else max(1, num_of_job // world.local_size)
