"""How much memory the loss may take: as configured, a default, or what a training step leaves free on the GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitron_train.config import DistillConfig
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.parallel.groups import Groups

SMALL_BYTES = 256 * 2**20  # caching this many bytes of logits is always acceptable, and avoids recomputing them
MEASURED_STEP = 2  # AdamW allocates its moments at the end of step 1
SHARE = 0.5  # of the memory that the measured step leaves free; the rest is for evaluations and fragmentation
MOST = 2.5  # units of U: both models' logits, and working blocks; the loss never needs more


def spare_bytes(device: torch.device) -> int:
    """Bytes of the GPU that this process could have taken in addition at its peak since the last `reset_peak`."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)


@dataclass(slots=True)
class LossMemory:
    """The memory of the loss during a training, in units of U (see Chunking).

    Without distill.logit_memory_fraction, it is 0.2 U or SMALL_BYTES, whichever is larger. On a GPU, step 2 of a training
    measures what its peak leaves free, and half of that is added. Block shapes depend on the memory, and they change sums
    by rounding. So the measured fraction belongs to the state of the run, and a resumed run does not measure again.

    Attributes:
        measured: fraction of U from step 2, the same on all ranks; None: not measured.
    """

    config: DistillConfig
    measured: float | None = None

    def chunking(self, num_tokens: int, num_rows: int) -> Chunking:
        """Memory and block shape for a micro-batch of `num_tokens` and `num_rows` vocabulary rows of this rank."""
        config = self.config
        fraction = config.logit_memory_fraction
        if fraction is None:
            fraction = self.measured or default_fraction(num_tokens, num_rows)
        return Chunking(logit_memory_fraction=fraction, vocab_tile=config.vocab_tile, token_chunk=config.token_chunk)

    def begin(self, step: int, device: torch.device) -> None:
        """Start measuring, if `step` is the measured one."""
        if step == MEASURED_STEP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def end(
        self,
        step: int,
        num_tokens: int,
        num_rows: int,
        groups: Groups,
        spare: Callable[[torch.device], float] = spare_bytes,
    ) -> None:
        """Set `measured` after the measured step; collective. The rank of the last stage with the least free memory decides."""
        if step != MEASURED_STEP or groups.device.type != "cuda" or self.config.logit_memory_fraction is not None:
            return
        before = default_fraction(num_tokens, num_rows)
        spare_here = spare(groups.device) if groups.is_last_stage else math.inf  # only the last stage computes the loss
        added = SHARE * max(0, spare_here) / (num_tokens * num_rows * 4)
        self.measured = groups.least(min(before + added, max(before, MOST)))


def default_fraction(num_tokens: int, num_rows: int) -> float:
    """0.2 U or SMALL_BYTES, whichever is larger, as a fraction of U."""
    return max(Chunking().logit_memory_fraction, SMALL_BYTES / (num_tokens * num_rows * 4))
