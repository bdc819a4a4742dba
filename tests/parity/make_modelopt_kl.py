"""Makes golden/modelopt_kl.safetensors: what NVIDIA ModelOpt's LogitsKLLoss answers, at tensor-parallel size 1 and 2.

    python -m tests.parity.make_modelopt_kl PEERS

PEERS is a folder with `nvidia-modelopt==0.47.0` in it (pip install --no-deps --target PEERS nvidia-modelopt==0.47.0 pulp).
Not run by the tests, which read the file: ModelOpt is no dependency.
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from tests.support.helpers import run_ranks
from tests.support.loss_reference import make_case

GOLDEN = Path(__file__).parent / "golden" / "modelopt_kl.safetensors"
TOKENS, VOCAB, STUDENT_HIDDEN, TEACHER_HIDDEN = 24, 192, 32, 48


def answer(rank: int, world_size: int, peers: Path) -> dict[str, np.ndarray]:
    """This rank's part: losses of tokens, gradients of hidden states (summed over ranks) and of its output rows."""
    sys.path.append(str(peers))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    from minitron_train.parallel import shims

    shims.install()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    case = make_case(TOKENS, VOCAB, STUDENT_HIDDEN, TEACHER_HIDDEN, torch.float32)
    rows = slice(rank * VOCAB // world_size, (rank + 1) * VOCAB // world_size)
    hidden_NH, weight_VH = case.student_NH.requires_grad_(), case.student_VH[rows].requires_grad_()
    student_NV = copy_to_tensor_model_parallel_region(hidden_NH) @ weight_VH.t()
    teacher_NV = case.teacher_ND @ case.teacher_VD[rows].t()
    config = SimpleNamespace(
        tensor_model_parallel_size=world_size, context_parallel_size=1, calculate_per_token_loss=False
    )
    loss_BS, tp_reduce, *_ = LogitsKLLoss(config)(student_NV[:, None], teacher_NV[:, None])
    hidden_grad, weight_grad = torch.autograd.grad(loss_BS.sum(), (hidden_NH, weight_VH))
    loss_B = loss_BS.detach().flatten()
    if tp_reduce:  # ModelOpt leaves the sum over ranks to its caller
        dist.all_reduce(loss_B)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    found = {"loss": loss_B, "hidden_grad": hidden_grad, "weight_grad": weight_grad}
    return {name: tensor.numpy() for name, tensor in found.items()}


def main() -> None:
    """Ask ModelOpt at both sizes, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    peers = parser.parse_args().peers.resolve()
    case = make_case(TOKENS, VOCAB, STUDENT_HIDDEN, TEACHER_HIDDEN, torch.float32)
    tensors = {name: getattr(case, name).numpy() for name in ("student_NH", "student_VH", "teacher_ND", "teacher_VD")}
    for tp in (1, 2):
        parts = run_ranks(answer, tp, peers)
        tensors |= {f"tp{tp}.{name}": parts[0][name] for name in ("loss", "hidden_grad")}
        tensors[f"tp{tp}.weight_grad"] = np.concatenate([part["weight_grad"] for part in parts])
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(tensors, GOLDEN)


if __name__ == "__main__":
    main()
