"""The forward KL and its gradients are those of NVIDIA ModelOpt's LogitsKLLoss, at tensor-parallel size 1 and 2."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from minitron_train.config import LossKind
from minitron_train.distillation.loss import LossSpec, distillation_loss
from tests.support.helpers import run_ranks
from tests.support.loss_reference import relative_error

GOLDEN = Path(__file__).parent / "golden" / "modelopt_kl.safetensors"  # make_modelopt_kl.py


def ours(rank: int, world_size: int) -> list[np.ndarray]:
    """Loss, gradient of the hidden states, gradient of this rank's output rows."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    golden = load_file(GOLDEN)
    student_VH, teacher_VD = (golden[name].chunk(world_size)[rank] for name in ("student_VH", "teacher_VD"))
    student_NH = golden["student_NH"].requires_grad_()
    student_VH.requires_grad_()
    spec = LossSpec(kind=LossKind.forward_kl)
    parts = distillation_loss(
        student_NH, student_VH, golden["teacher_ND"], teacher_VD, loss=spec, group=dist.group.WORLD
    )
    hidden_grad, weight_grad = torch.autograd.grad(parts.total, [student_NH, student_VH])
    dist.destroy_process_group()
    return [tensor.detach().numpy() for tensor in (parts.total, hidden_grad, weight_grad)]


@pytest.mark.parametrize("tp", [1, 2])
def test_loss_and_gradients_are_modelopts(tp: int) -> None:
    golden = load_file(GOLDEN)
    parts = run_ranks(ours, tp)
    loss, hidden_grad = (torch.from_numpy(found) for found in parts[0][:2])
    weight_grad = torch.from_numpy(np.concatenate([part[2] for part in parts]))
    assert loss.item() == pytest.approx(golden[f"tp{tp}.loss"].sum().item(), rel=1e-5)
    assert relative_error(hidden_grad, golden[f"tp{tp}.hidden_grad"]) < 1e-5
    assert relative_error(weight_grad, golden[f"tp{tp}.weight_grad"]) < 1e-5
