"""Rank and world size from the launcher's variables, and this process's share of the cores. No torch: it runs before."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from minitron_train.runtime.errors import UserError

Environ = Mapping[str, str]
MOST_THREADS = 65536  # per process: with more, the OpenMP library aborts the process


@dataclass(frozen=True, slots=True)
class World:
    """Rank and size from torchrun (RANK, …) or srun (SLURM_PROCID, …); by default a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints for all."""
        return self.rank == 0


def whole_number(environ: Environ, name: str, default: int, *, least: int = 0, most: int = 2**31 - 1) -> int:
    """An environment variable as a whole number; `default` where it is unset or empty.

    Raises:
        UserError: it is not a whole number from `least` to `most`.
    """
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and least <= int(text) <= most):
        raise UserError(f"{name}={text[:40]!r}: must be a whole number from {least} to {most}; correct or unset it")
    return int(text)


def check_hub_variables(environ: Environ) -> None:
    """Refuse values with which the import of huggingface_hub fails; transformers and datasets import it too.

    Raises:
        UserError: an address that cannot be parsed, or a timeout that is not a whole number.
    """
    endpoint = environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint)
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT={endpoint!r}: is not an address ({error}); correct or unset it") from error
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        whole_number(environ, name, 0)


def rendezvous(environ: Environ) -> tuple[str, int]:
    """The rendezvous of all ranks: address and port from MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: one of them is not set, or the port is not a port number.
    """
    address = environ.get("MASTER_ADDR", "").strip()
    port = whole_number(environ, "MASTER_PORT", 0, least=1, most=65535)
    if not address or not port:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(
            f"{missing} is not set: several processes need a rendezvous; start them with torchrun, "
            "or set MASTER_ADDR and MASTER_PORT as slurm/common.sh does"
        )
    return address, port


def host_name(environ: Environ) -> str:
    """The name under which other nodes reach this one."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def under_torchrun(environ: Environ) -> bool:
    """Whether torchrun's variables are set. They take precedence over Slurm's."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def read_world(environ: Environ = os.environ) -> World:
    """The world from the environment. srun's variables count only inside a job step (SLURM_STEP_ID) of several tasks.

    Raises:
        UserError: the variables are not whole numbers, or the rank is not below the size.
    """
    if under_torchrun(environ):
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif {"SLURM_PROCID", "SLURM_STEP_ID"} <= environ.keys() and whole_number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return World()
    # SLURM_STEP_TASKS_PER_NODE looks like 4(x2),3
    found = [environ.get(key, default).split("(")[0].split(",")[0] for key, default in zip(keys, "0101", strict=True)]
    given = ", ".join(f"{key}={value[:20]!r}" for key, value in zip(keys, found, strict=True))
    if not all(value.isascii() and value.isdecimal() and len(value) < 10 for value in found):
        raise UserError(f"{given}: must be whole numbers; start with torchrun or srun")
    rank, size, local_rank, local_size = map(int, found)
    if rank >= size:
        raise UserError(f"{given}: a rank must be below its world's size; start with torchrun or srun")
    return World(rank, size, local_rank, local_size)


def share_cores(world: World) -> None:
    """Set OMP_NUM_THREADS to this process's share of the cores, unless the user has set it.

    torchrun sets OMP_NUM_THREADS=1 itself when it is unset, and leaves no mark. So under torchrun the value 1 does not
    count as the user's.

    Raises:
        UserError: OMP_NUM_THREADS is not a number of threads, or one per nested level as in 4,2.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    for level in (chosen or "").split(","):
        whole_number({"OMP_NUM_THREADS": level}, "OMP_NUM_THREADS", 1, least=1, most=MOST_THREADS)
    if chosen is None or ("TORCHELASTIC_RUN_ID" in os.environ and chosen == "1"):
        os.environ["OMP_NUM_THREADS"] = str(own_cores(world, os.environ, len(os.sched_getaffinity(0))))


def own_cores(world: World, environ: Environ, num_usable: int) -> int:
    """Number of cores for this process. Cores that srun has bound to it alone are not divided again.

    Example: 8 tasks on 112 cores get 14 each, whether srun binds each task to 14 cores or to all 112.
    """
    if under_torchrun(environ) or "SLURM_STEP_ID" not in environ:
        return max(1, num_usable // world.local_size)
    if per_task := whole_number(environ, "SLURM_CPUS_PER_TASK", 0):
        return min(num_usable, per_task)  # may be the batch script's value, not the step's
    num_here = os.cpu_count() or 1
    num_of_job = min(num_here, whole_number(environ, "SLURM_CPUS_ON_NODE", num_here, least=1))
    return num_usable if num_usable < num_of_job else max(1, num_of_job // world.local_size)
