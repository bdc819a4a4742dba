"""Who started this process, and its share of the machine. No torch here: it runs before torch is imported."""

import os
from dataclasses import dataclass

from minitron_train.errors import UserError


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


def read_world(environ: dict[str, str] | os._Environ[str] = os.environ) -> World:
    """The world from the environment. An srun task counts only inside a job step (SLURM_STEP_ID) of several tasks."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
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
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if chosen is None or (under_torchrun and chosen == "1"):
        cores = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // world.local_size))
