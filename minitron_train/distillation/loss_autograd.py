"""A user-defined distillation loss on logits, differentiated by autograd: slower than a fused term, but one function.

Every tensor-parallel rank holds the logits of a few tokens over the whole vocabulary, and recomputes them in the backward
pass. A fused term in `loss_terms.py` never gathers logits.

Legend: N tokens, C tokens of a chunk, V output rows (of this rank, or of all ranks after the gather), H, D hidden sizes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minitron_train.distillation.loss_terms import all_reduce
from minitron_train.model.vocabulary import LogitMap, OutputLayer
from minitron_train.runtime.errors import UserError

TokenLoss = Callable[[Tensor, Tensor], Tensor]  # (student logits [C, V], teacher logits [C, V]) -> loss per token [C]
CHUNK_BYTES = 256 * 2**20  # size of one chunk of one model's logits, over the whole vocabulary


class SumGradient(torch.autograd.Function):
    """Identity forward; backward sums the gradient over the ranks, which each hold a part of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return a view, because autograd does not accept the input itself."""
        ctx.group = group
        return x_NH.view_as(x_NH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient summed over the ranks."""
        return all_reduce(grads[0].contiguous(), ctx.group), None


class GatherVocabulary(torch.autograd.Function):
    """All-gather of logits along the vocabulary; backward takes this rank's columns, as all ranks compute the same loss."""

    @staticmethod
    def forward(ctx: Any, local_CV: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[C, V] of this rank -> [C, V of all ranks]."""
        ctx.columns = slice(group.rank() * local_CV.shape[1], (group.rank() + 1) * local_CV.shape[1])
        parts = [torch.empty_like(local_CV) for _ in range(group.size())]
        dist.all_gather(parts, local_CV.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """This rank's columns."""
        return grads[0][:, ctx.columns], None


def summed_loss(
    function: TokenLoss,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    maps: tuple[LogitMap, LogitMap],
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Σ over tokens of `function`, differentiable in the student's tensors.

    Args:
        student: hidden states [N, H], the same on every rank of `group`, and this rank's output rows [V, H].
        teacher: the teacher's, [N, D] and [V, D]; no gradients flow to them.
        maps: the student's and the teacher's.
        vocab_size: output rows without padding, all ranks together; the function never sees the padding.

    Raises:
        UserError: the function does not return one loss per token, or its loss has no gradient.
    """
    dtype = torch.promote_types(torch.promote_types(student[0].dtype, teacher[1].dtype), torch.float32)
    hidden_NH, weight_VH = student[0].to(dtype), student[1].to(dtype)
    if group is not None:
        hidden_NH = SumGradient.apply(hidden_NH, group)
    teacher_ND, teacher_VD = (x.to(dtype) for x in teacher)

    def logits(hidden_CH: Tensor, rows_VH: Tensor, map: LogitMap) -> Tensor:
        local_CV = OutputLayer(rows_VH, map).logits(hidden_CH)
        whole_CV = local_CV if group is None else GatherVocabulary.apply(local_CV, group)
        return whole_CV[:, :vocab_size]

    def chunk_loss(hidden_CH: Tensor, rows_VH: Tensor, teacher_CD: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_CV = logits(teacher_CD, teacher_VD, maps[1])
        loss_C = function(logits(hidden_CH, rows_VH, maps[0]), teacher_CV)
        if not isinstance(loss_C, Tensor) or loss_C.shape != (len(hidden_CH),):
            found = f"a tensor of {list(loss_C.shape)}" if isinstance(loss_C, Tensor) else type(loss_C).__name__
            raise UserError(
                f"the loss function returned {found} for {len(hidden_CH)} tokens; it must return one loss per token, "
                f"[{len(hidden_CH)}]"
            )
        if hidden_NH.requires_grad and torch.is_grad_enabled() and not loss_C.requires_grad:
            raise UserError(
                "the loss function returned a loss without gradients; compute it from the student's logits, without "
                "detach() or no_grad()"
            )
        return loss_C.sum()

    size = max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))
    parts = zip(hidden_NH.split(size), teacher_ND.split(size), strict=True)
    sums = [checkpoint(chunk_loss, x_CH, weight_VH, y_CD, use_reentrant=False) for x_CH, y_CD in parts]
    return torch.stack(sums).sum() if sums else (hidden_NH.sum() + weight_VH.sum()) * 0.0
