"""megatron-core's speed switches: which of them a training uses on this machine.

Each switch has a plain path that computes the same. A training prints those that it uses and records them.
"""

import importlib.util
import os
from dataclasses import dataclass

import torch

from minitron_train.config import Config
from minitron_train.parallel.groups import Groups

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"  # read by CUDA when a process first uses the GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """The switches of one training. With all of them off it takes the plain paths.

    Attributes:
        gradient_overlap: ranks sum gradients while the backward pass computes the next ones.
        weight_overlap: ranks gather updated weights while the next forward pass computes; needs a sharded optimizer.
        fused_gradients: the product that gives a weight's gradient adds to the fp32 sum, without a tensor of its own.
        transformer_engine: Transformer Engine's layers, with fused SwiGLU and rotary embedding where the model allows them.
        fp8_teacher: Transformer Engine multiplies the teacher's matrices in FP8.
    """

    gradient_overlap: bool = False
    weight_overlap: bool = False
    fused_gradients: bool = False
    transformer_engine: bool = False
    fp8_teacher: bool = False

    @classmethod
    def of(cls, config: Config, groups: Groups) -> "Switches":
        """The switches that the configuration, the ranks and the machine allow."""
        cuda, wanted = groups.device.type == "cuda", config.parallel.overlap_communication
        overlaps = groups.dp_size > 1 and (cuda if wanted is None else wanted)
        return cls(
            gradient_overlap=overlaps,
            weight_overlap=overlaps and config.train.distributed_optimizer,
            fused_gradients=has_fused_gradients(groups.device),
            transformer_engine=config.train.transformer_engine,
            fp8_teacher=config.distill.teacher_fp8,
        )

    @property
    def words(self) -> str:
        """The switches that are on, for a log line."""
        names = {
            "gradient sums overlap with the backward pass": self.gradient_overlap,
            "weight gathers overlap with the forward pass": self.weight_overlap,
            "weight gradients are added by APEX's kernel": self.fused_gradients,
            "Transformer Engine's layers": self.transformer_engine,
            "teacher in FP8": self.fp8_teacher,
        }
        return ", ".join(name for name, is_on in names.items() if is_on)


PLAIN_PATHS = Switches()


def has_fused_gradients(device: torch.device) -> bool:
    """Whether APEX's kernel is installed, which megatron-core asks for, and the device is a GPU.

    Transformer Engine's layers have a kernel of their own, but the same setting switches on both.
    """
    return device.type == "cuda" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def connections_warning(groups: Groups, switches: Switches) -> str | None:
    """Why this run needs CUDA_DEVICE_MAX_CONNECTIONS=1, or None if it is set or makes no difference.

    With one connection the GPU starts kernels in the order in which megatron-core issues them, so that communication begins
    before the computation that hides it.
    """
    found = os.environ.get(CONNECTIONS)
    overlaps = groups.tp_size > 1 or switches.gradient_overlap or switches.weight_overlap
    if groups.device.type != "cuda" or not overlaps or found == "1":
        return None
    value = "is not set" if found is None else f"is {found}"
    return f"{CONNECTIONS} {value}; export {CONNECTIONS}=1 before the start, or communication may not overlap"
