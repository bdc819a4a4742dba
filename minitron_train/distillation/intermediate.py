"""Losses between hidden states of student and teacher, for students with pruned layers (arXiv 2407.14679 §3).

Legend: N tokens, H student's hidden size, D teacher's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minitron_train.config import HiddenLossKind
from minitron_train.parallel.copies import sharded_copies
from minitron_train.runtime.errors import UserError


class HiddenProjection(nn.Module):
    """A learned linear map from the student's hidden size [N, H] to the teacher's [N, D], shared by all pairs of layers.

    Where the sizes are equal it is the identity without parameters. All tensor-parallel ranks hold the same weights, and
    get the same gradients if they are given the same hidden states.
    """

    def __init__(self, student_hidden_size: int, teacher_hidden_size: int) -> None:
        super().__init__()
        if student_hidden_size > teacher_hidden_size:
            raise UserError(
                f"hidden_size={student_hidden_size}: wider than the teacher's {teacher_hidden_size}, to which intermediate "
                "losses project up; choose a narrower student or leave intermediate losses out"
            )
        same = student_hidden_size == teacher_hidden_size
        self.linear = nn.Identity() if same else nn.Linear(student_hidden_size, teacher_hidden_size, bias=False)

    def forward(self, student_NH: Tensor) -> Tensor:
        """[N, H] to [N, D]."""
        return self.linear(student_NH)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Megatron-core's description of the weights in a checkpoint: the same on all ranks."""
        return sharded_copies(self, prefix, sharded_offsets)


def hidden_loss(projected_ND: Tensor, teacher_ND: Tensor, mask_N: Tensor | None, kind: HiddenLossKind) -> Tensor:
    """Sum over the valid tokens of 1 - cos(student, teacher), or of the mean squared difference of the channels.

    It is computed in fp32 or wider. The teacher gets no gradient. `mask_N` (bool, or nonzero) marks valid tokens.
    """
    teacher_ND = teacher_ND.detach()
    if mask_N is not None:
        valid_N = mask_N != 0
        projected_ND, teacher_ND = projected_ND[valid_N], teacher_ND[valid_N]
    dtype = torch.promote_types(projected_ND.dtype, torch.float32)
    projected_ND, teacher_ND = projected_ND.to(dtype), teacher_ND.to(dtype)
    if kind is HiddenLossKind.cosine:
        return (1 - F.cosine_similarity(projected_ND, teacher_ND, dim=-1)).sum()
    return (projected_ND - teacher_ND).square().mean(dim=-1).sum()


def intermediate_loss(
    pairs: Sequence[tuple[Tensor, Tensor]],
    projection: HiddenProjection,
    *,
    mask_N: Tensor | None = None,
    kind: HiddenLossKind = HiddenLossKind.cosine,
) -> Tensor:
    """L_is: `hidden_loss` averaged over the pairs (student's [N, H], teacher's [N, D]), summed over the valid tokens.

    A pair holds the outputs of both embeddings, or of a student's layer and its counterpart in the teacher. The paper pairs
    the third-last layers.
    """
    if not pairs:
        raise UserError("intermediate layers: none are named; name at least one pair, or set the weight to 0")
    losses = [hidden_loss(projection(student_NH), teacher_ND, mask_N, kind) for student_NH, teacher_ND in pairs]
    return torch.stack(losses).mean()
