"""Every symbol of torch and megatron-core that this program replaces, and the versions that need it.

megatron-core 0.16.1 is the newest release for Python 3.11, 0.19 needs Python 3.12. tests/unit/test_shims.py fails when the
installed release lacks a symbol that is replaced in it, and when it still has one that a newer release dropped.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import package_info

from minitron_train.parallel import cpu

MEGATRON: tuple[int, int] = (package_info.MAJOR, package_info.MINOR)

RANDOM = "megatron.core.tensor_parallel.random"
CHECKPOINTS = "megatron.core.dist_checkpointing"


@dataclass(frozen=True, slots=True)
class Shim:
    """A symbol to replace: `name` in `module`, in megatron-core's releases from `since` to the one before `before`."""

    module: str
    name: str  # "Class.method" for a method
    reason: str
    since: tuple[int, int] = (0, 16)
    before: tuple[int, int] = (1, 0)

    @property
    def applies(self) -> bool:
        """Whether the installed release has this symbol and needs the replacement."""
        return self.since <= MEGATRON < self.before

    @property
    def owner(self) -> Any:
        """The module or class that holds the symbol."""
        *classes, _ = self.name.split(".")
        return functools.reduce(getattr, classes, importlib.import_module(self.module))

    @property
    def attribute(self) -> str:
        """The symbol's name in its owner."""
        return self.name.rpartition(".")[2]

    def put(self, value: Any) -> None:
        """Replace the symbol for the rest of the process."""
        setattr(self.owner, self.attribute, value)


# without CUDA
CPU: dict[Shim, Any] = {
    Shim("torch.cuda", "current_device", "rotary embedding, tensor-parallel mappings"): lambda: torch.device("cpu"),
    Shim("torch.cuda", "synchronize", "dist_checkpointing"): lambda device=None: None,
    Shim("torch.cuda", "current_stream", "gradient reduction", since=(0, 19)): lambda device=None: None,
    Shim(RANDOM, "_get_cuda_rng_state", "random states"): lambda *args, **kwargs: torch.get_rng_state(),
    Shim(RANDOM, "_set_cuda_rng_state", "random states"): lambda state, *args, **kwargs: torch.set_rng_state(state),
    Shim(RANDOM, "CudaRNGStatesTracker", "random states"): cpu.CpuRngTracker,
}

# saving checkpoints: megatron-core's queue needs a spawned process, and rank 0 writes alone between two collectives
RESULTS_QUEUE = Shim(f"{CHECKPOINTS}.strategies.filesystem_async", "_results_queue", "a queue of this process")
RANK0_WRITES = (
    Shim(f"{CHECKPOINTS}.strategies.filesystem_async", "FileSystemWriterAsync.finish", "writes .metadata"),
    Shim(f"{CHECKPOINTS}.serialization", "save_config", "writes metadata.json"),
)

# loading checkpoints: megatron-core unpickles any class
LOAD_READER = Shim(f"{CHECKPOINTS}.strategies.torch", "_get_filesystem_reader", "reads .metadata")
LOAD_PLANNER = Shim(f"{CHECKPOINTS}.strategies.torch", "MCoreLoadPlanner", "reads objects such as `_extra_state`")
LOAD_COMMON = (  # the state that is not sharded
    Shim(f"{CHECKPOINTS}.strategies.common", "TorchCommonLoadStrategy.load_common", "reads common.pt", before=(0, 19)),
    Shim(f"{CHECKPOINTS}.serialization", "load_common_state_dict", "reads common.pt or a chunk", since=(0, 19)),
)

SHIMS = (*CPU, RESULTS_QUEUE, *RANK0_WRITES, LOAD_READER, LOAD_PLANNER, *LOAD_COMMON)


def install() -> None:
    """Replace the symbols of `CPU` for the whole process on a machine without CUDA; call it once per process."""
    if torch.cuda.is_available():
        return
    for shim, value in CPU.items():
        if shim.applies:
            shim.put(value)


@contextlib.contextmanager
def replaced(values: Mapping[Shim, Any]) -> Iterator[None]:
    """Replace symbols during a block. Shims of other releases are ignored."""
    with contextlib.ExitStack() as stack:
        for shim, value in values.items():
            if shim.applies:
                stack.callback(shim.put, getattr(shim.owner, shim.attribute))
                shim.put(value)
        yield


def save_arguments() -> dict[str, Any]:
    """Return the arguments of `dist_checkpointing.save` that select megatron-core's own writer.

    The default writer of 0.19 needs the package nvidia-resiliency-ext.
    """
    return {"async_strategy": "mcore"} if MEGATRON >= (0, 19) else {}
