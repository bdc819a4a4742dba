"""What megatron-core's hard-coded CUDA means on a machine without it: named random states, and literal device names.

`parallel.shims` puts the random states in place. `cuda_means_cpu` rewrites device names for a block of code (optimizer
construction, steps and state dicts), and does nothing where CUDA exists.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from torch.overrides import TorchFunctionMode


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """megatron-core's named random states, kept on the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        """Create the state `name` from `seed`, which must be new."""
        assert seed not in self.seeds_ and name not in self.states_, f"random state {name} ({seed}) exists already"
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Use the random state `name` during a block, then restore the default one."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)


class CudaMeansCpu(TorchFunctionMode):
    """Rewrites device="cuda", .cuda() and the type name torch.cuda.FloatTensor to their CPU meaning."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # the optimizer asks for 'torch.cuda.FloatTensor'
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to:
            args = tuple(torch.device("cpu") if is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def is_cuda(device: Any) -> bool:
    """Whether a device argument (a string, a torch.device or anything else) names CUDA."""
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def cuda_means_cpu() -> contextlib.AbstractContextManager[Any]:
    """Make literal CUDA devices mean the CPU during a block."""
    return contextlib.nullcontext() if torch.cuda.is_available() else CudaMeansCpu()
