"""The plan's passes over the logits are those that the loss makes: every tensor operation of a call is counted."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_train.config import DistillConfig, LossKind
from minitron_train.distillation.loss import LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.planning.timing import logit_passes

NOT_PASSES = {"mm", "addmm", "empty", "empty_like", "new_empty", "detach"}  # products are counted in FLOPs
NUM_TOKENS, VOCAB, WIDTH = 256, 4096, 4


class Traffic(TorchDispatchMode):
    """Counts the elements that operations read and write, matrix products and views aside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in NOT_PASSES:
            given = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            tensors = [leaf for leaf in tree_leaves((args, given, result)) if isinstance(leaf, torch.Tensor)]
            self.elements += sum(tensor.numel() for tensor in tensors)
        return result


LOSSES = [
    *(DistillConfig(loss=kind, top_k=8 * (kind is LossKind.top_k_kl)) for kind in LossKind),
    *(DistillConfig(loss=kind, temperature=2) for kind in (LossKind.forward_kl, LossKind.reverse_kl, LossKind.jsd)),
    DistillConfig(kd_weight=0, ce_weight=1),
    DistillConfig(ce_weight=1),
]


@pytest.mark.parametrize("distill", LOSSES, ids=lambda distill: f"{distill.loss.value}-{distill.temperature}")
def test_the_passes_over_logits_are_counted(distill: DistillConfig) -> None:
    names = ("kind", "temperature", "top_k", "kd_weight", "ce_weight")
    spec = LossSpec(**{name: getattr(distill, "loss" if name == "kind" else name) for name in names})
    student, teacher = ([torch.randn(size, WIDTH) for size in (NUM_TOKENS, VOCAB)] for _ in range(2))
    for tensor in student:
        tensor.requires_grad_()
    labels = torch.zeros(NUM_TOKENS, dtype=torch.long)
    with Traffic() as traffic:
        loss = distillation_loss(
            *student, *teacher, loss=spec, labels_N=labels, chunking=Chunking(logit_memory_fraction=100)
        )
        loss.total.backward()
    assert traffic.elements / (NUM_TOKENS * VOCAB) == pytest.approx(logit_passes(distill), abs=0.3)
