"""One process of benchmarks/speed/kd_loss.py: makes the inputs, runs one implementation, prints one line of JSON.

Legend: N tokens, V output rows of this rank, H student's hidden size, D teacher's.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_train.distillation.loss import LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking

LOGIT_STD = 3.0
PIECES = 64  # the inputs are drawn in parts, so that a rank can make its shard alone


@dataclass(frozen=True, slots=True)
class Task:
    """The parent's request, as JSON in the first argument."""

    implementation: str
    tokens: int
    vocab: int
    student_hidden: int
    teacher_hidden: int
    repeats: int = 0
    chunking: dict[str, Any] | None = None
    peers: str = ""
    reference: str = ""


@dataclass(slots=True)
class Inputs:
    """Hidden states and this rank's output weights; logits have a standard deviation of 3."""

    student_NH: Tensor
    student_VH: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What gets gradients."""
        return self.student_NH, self.student_VH


def make_inputs(task: Task, rank: int = 0, world_size: int = 1) -> Inputs:
    """Random inputs, equal for every number of ranks."""

    def rows(seed: int, first: int, last: int, total: int, width: int, scale: float) -> Tensor:
        out = torch.empty(last - first, width)
        size = -(-total // PIECES)
        for piece in range(PIECES):
            low, high = max(first, piece * size), min(last, (piece + 1) * size, total)
            if low < high:
                drawn = torch.randn(size, width, generator=torch.Generator().manual_seed(seed * PIECES + piece))
                torch.mul(drawn[low - piece * size : high - piece * size], scale, out=out[low - first : high - first])
        return out

    low, high = rank * task.vocab // world_size, (rank + 1) * task.vocab // world_size
    student, teacher = task.student_hidden, task.teacher_hidden
    return Inputs(
        rows(1, 0, task.tokens, task.tokens, student, 1.0).requires_grad_(),
        rows(2, low, high, task.vocab, student, LOGIT_STD / student**0.5).requires_grad_(),
        rows(3, 0, task.tokens, task.tokens, teacher, 1.0),
        rows(4, low, high, task.vocab, teacher, LOGIT_STD / teacher**0.5),
    )


Loss = Callable[[Inputs, ProcessGroup | None], Tensor]


def make_ours(task: Task) -> Loss:
    """This project's fused loss."""
    chunking = Chunking(**(task.chunking or {}))

    def loss(x: Inputs, group: ProcessGroup | None) -> Tensor:
        inputs = x.student_NH, x.student_VH, x.teacher_ND, x.teacher_VD
        return distillation_loss(*inputs, loss=LossSpec(), group=group, chunking=chunking).total / task.tokens

    return loss


def both_logits(x: Inputs) -> tuple[Tensor, Tensor]:
    """Logits of both models; every implementation except the fused losses needs them."""
    with torch.no_grad():
        teacher_NV = F.linear(x.teacher_ND, x.teacher_VD)
    return F.linear(x.student_NH, x.student_VH), teacher_NV


def make_naive(task: Task) -> Loss:
    """linear, log_softmax and F.kl_div."""

    def loss(x: Inputs, group: ProcessGroup | None) -> Tensor:
        student_NV, teacher_NV = both_logits(x)
        log_p_NV, log_q_NV = F.log_softmax(student_NV, dim=-1), F.log_softmax(teacher_NV, dim=-1)
        return F.kl_div(log_p_NV, log_q_NV, reduction="sum", log_target=True) / task.tokens

    return loss


def make_modelopt(task: Task) -> Loss:
    """nvidia-modelopt's loss for Megatron; with tensor parallelism after megatron's copy into the parallel region."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss  # type: ignore[import-not-found]

    if dist.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())

    def loss(x: Inputs, group: ProcessGroup | None) -> Tensor:
        tp = 1 if group is None else group.size()
        config = SimpleNamespace(tensor_model_parallel_size=tp, context_parallel_size=1, calculate_per_token_loss=False)
        hidden_NH = x.student_NH if tp == 1 else copy_to_tensor_model_parallel_region(x.student_NH)
        student_NV, teacher_NV = both_logits(Inputs(hidden_NH, x.student_VH, x.teacher_ND, x.teacher_VD))
        per_token_BS, *_ = LogitsKLLoss(config)(student_NV[:, None], teacher_NV[:, None])
        return per_token_BS.sum() / task.tokens

    return loss


def make_torchtune(task: Task) -> Loss:
    """torchtune's chunked loss, loaded from its file because importing torchtune needs torchao; the linear is chunked too.

    Its value is a cross-entropy, its gradient that of the KL divergence.
    """
    path = Path(task.peers) / "torchtune/modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chunked = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=8)

    def loss(x: Inputs, group: ProcessGroup | None) -> Tensor:
        with torch.no_grad():
            teacher = [F.linear(part[None], x.teacher_VD) for part in x.teacher_ND.chunk(8)]
        student = [F.linear(part[None], x.student_VH) for part in x.student_NH.chunk(8)]
        return chunked(student, teacher, torch.zeros(1, task.tokens, dtype=torch.long))

    return loss


def make_liger(task: Task) -> Loss:
    """Liger's fused linear JSD with beta 0 (the forward KL), in chunks of 128 tokens, without torch.compile."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    fused = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=128
    )

    def loss(x: Inputs, group: ProcessGroup | None) -> Tensor:
        labels = torch.zeros(task.tokens, dtype=torch.long)
        return fused(x.student_NH, x.student_VH, x.teacher_ND, x.teacher_VD, labels)

    return loss


IMPLEMENTATIONS: dict[str, Callable[[Task], Loss]] = {
    "ours": make_ours,
    "naive": make_naive,
    "modelopt": make_modelopt,
    "torchtune": make_torchtune,
    "liger": make_liger,
}


def memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(task: Task, loss: Loss, x: Inputs, group: ProcessGroup | None) -> dict[str, Any]:
    """Peak resident memory of one forward and backward pass beyond inputs and gradients, and seconds of later passes."""
    little = make_inputs(Task(task.implementation, task.tokens, 1024 * (group.size() if group else 1), 64, 64))
    if group is not None:
        student_VH = little.student_VH[:1024].detach().requires_grad_()
        little = Inputs(little.student_NH, student_VH, little.teacher_ND, little.teacher_VD[:1024])
    loss(little, group).backward()  # threads, libraries and code are loaded before the baseline
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_bytes("VmRSS")
    loss(x, group).backward()
    gradients = sum(leaf.nbytes for leaf in x.leaves)
    logits = 4 * task.tokens * len(x.student_VH)
    peak_u = (memory_bytes("VmHWM") - before - gradients) / logits
    seconds = []
    for _ in range(task.repeats):
        for leaf in x.leaves:
            leaf.grad = None
        start_s = time.perf_counter()
        loss(x, group).backward()
        seconds.append(time.perf_counter() - start_s)
    return {"peak_u": peak_u, "seconds": seconds}


def squares(task: Task, x: Inputs, rank: int, world_size: int) -> dict[str, float]:
    """Squared Frobenius norms of the gradients' errors and of the reference. The parent adds them over the ranks."""
    exact = torch.load(task.reference, mmap=True)
    low, high = rank * task.vocab // world_size, (rank + 1) * task.vocab // world_size
    result = {"hidden": 0.0, "hidden_exact": 0.0, "weight": 0.0, "weight_exact": 0.0}
    for name, found, expected in (
        ("hidden", x.student_NH.grad, exact["hidden"]),
        ("weight", x.student_VH.grad, exact["weight"][low:high]),
    ):
        assert found is not None
        for one, other in zip(found.split(8192), expected.split(8192), strict=True):
            result[name] += float((one.double() - other).square().sum())
            result[f"{name}_exact"] += float(other.square().sum())
    return result


def write_reference(task: Task) -> None:
    """Gradients of the mean forward KL in float64, 64 tokens at a time over the full vocabulary."""
    x = make_inputs(task)
    student_VH, teacher_VD = x.student_VH.detach().double(), x.teacher_VD.double()
    hidden_grad, weight_grad = torch.empty(x.student_NH.shape).double(), torch.zeros_like(student_VH)
    for first in range(0, task.tokens, 64):
        rows = slice(first, first + 64)
        student_RH = x.student_NH.detach()[rows].double()
        p_RV = F.softmax(student_RH @ student_VH.T, dim=-1)
        p_RV -= F.softmax(x.teacher_ND[rows].double() @ teacher_VD.T, dim=-1)
        p_RV /= task.tokens
        hidden_grad[rows] = p_RV @ student_VH
        weight_grad.addmm_(p_RV.T, student_RH)
    torch.save({"hidden": hidden_grad, "weight": weight_grad}, task.reference)


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    if task.peers:
        sys.path.append(task.peers)
    if task.implementation == "reference":
        write_reference(task)
        print("{}")
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo")
    group = dist.group.WORLD if world_size > 1 else None
    loss = IMPLEMENTATIONS[task.implementation](task)
    x = make_inputs(task, rank, world_size)
    result = measure(task, loss, x, group)
    if task.reference:
        result |= squares(task, x, rank, world_size)
    print(json.dumps(result))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
