"""The fused loss: sweeps over logit blocks, differentiable in the student's hidden states and output weights.

Legend: N tokens, V output rows of this tensor-parallel rank, H student's hidden size, R rows and C columns of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_train.distillation.loss_blocks import (
    Block,
    Chunking,
    LogitBlocks,
    Projection,
    Role,
    plan_blocks,
)
from minitron_train.distillation.loss_terms import Term, all_reduce
from minitron_train.model.vocabulary import LogitMap, OutputLayer


@dataclass(frozen=True, slots=True)
class WeightedTerm:
    """A loss term. Its value is multiplied by `factor`, and enters the total with `weight`."""

    term: Term
    factor: float
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The inputs of one call, except the student's tensors.

    `make_terms` takes an empty tensor [N] in the dtype of the logits. `vocab` counts this rank's output rows without
    padding.
    """

    make_terms: Callable[[Tensor], dict[str, WeightedTerm]]
    teacher: tuple[Tensor, Tensor] | None
    student_map: LogitMap
    teacher_map: LogitMap
    vocab: int
    group: dist.ProcessGroup | None
    chunking: Chunking
    wants_grad: bool


class FusedLoss(torch.autograd.Function):
    """(hidden states [N, H], output weights [V, H], Problem) -> total, kd_sum, ce_sum."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of every row, in as many sweeps as the terms need."""
        dtype = _logit_dtype(hidden_NH, problem)
        terms = problem.make_terms(hidden_NH.new_empty(len(hidden_NH), dtype=dtype))
        weight_grad_VH = _empty_grad(weight_VH) if problem.wants_grad and weight_VH.requires_grad else None
        blocks = _make_blocks(hidden_NH, weight_VH, weight_grad_VH, problem, list(terms.values()))
        for sweep in range(max(weighted.term.num_sweeps for weighted in terms.values())):
            swept = [weighted.term for weighted in terms.values() if sweep < weighted.term.num_sweeps]
            for block in blocks:
                for term in swept:
                    term.observe(sweep, block)
            for term in swept:
                term.reduce(sweep, problem.group)
        nothing = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        sums = {name: weighted.factor * weighted.term.loss_N.sum() for name, weighted in terms.items()}
        total = sum((weighted.weight * sums[name] for name, weighted in terms.items()), nothing)
        parts = sums.get("kd", nothing).to(dtype), sums.get("ce", nothing).to(dtype)
        ctx.mark_non_differentiable(*parts)
        if problem.wants_grad:
            ctx.save_for_backward(hidden_NH, weight_VH)
            ctx.problem, ctx.terms, ctx.blocks = problem, list(terms.values()), blocks
        return total.to(dtype), *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """One more sweep: the gradient of each block's logits gives the gradients of hidden states and weights.

        All memory is freed afterwards, so a loss tensor that is kept for logging holds none. With `retain_graph`, a second
        backward pass recomputes all logits.
        """
        hidden_NH, weight_VH = ctx.saved_tensors  # raises if they were modified since the forward pass
        blocks: LogitBlocks = ctx.blocks
        hidden_grad_NH = torch.zeros_like(hidden_NH, dtype=blocks.dtype) if ctx.needs_input_grad[0] else None
        if blocks.weight_grad_VH is None and ctx.needs_input_grad[1]:
            blocks.weight_grad_VH = _empty_grad(weight_VH)
        _sweep_gradients(blocks, ctx.terms, grads[0], hidden_grad_NH)
        if hidden_grad_NH is not None:
            hidden_grad_NH = all_reduce(hidden_grad_NH, ctx.problem.group).to(hidden_NH.dtype)
        return hidden_grad_NH, blocks.release(), None


def _empty_grad(weight_VH: Tensor) -> Tensor:
    return torch.empty_like(weight_VH, memory_format=torch.contiguous_format)


def _logit_dtype(hidden_NH: Tensor, problem: Problem) -> torch.dtype:
    """fp32, or fp64 when a model is."""
    teacher = hidden_NH.dtype if problem.teacher is None else problem.teacher[1].dtype
    return torch.promote_types(torch.promote_types(hidden_NH.dtype, teacher), torch.float32)


def _make_blocks(
    hidden_NH: Tensor, weight_VH: Tensor, weight_grad_VH: Tensor | None, problem: Problem, terms: list[WeightedTerm]
) -> LogitBlocks:
    """The grid of logit blocks; it caches logits if a later sweep reads them."""
    dtype = _logit_dtype(hidden_NH, problem)
    student = Projection(hidden_NH.detach(), OutputLayer(weight_VH.detach(), problem.student_map), dtype)
    projections: dict[Role, Projection] = {"student": student}
    if problem.teacher is not None:
        teacher_ND, teacher_VD = problem.teacher
        projections["teacher"] = Projection(teacher_ND, OutputLayer(teacher_VD, problem.teacher_map), dtype)
    plan = plan_blocks(problem.chunking, len(hidden_NH), problem.vocab, projections, weight_grad_VH)
    reread = problem.wants_grad and any(weighted.term.gradient_reads_logits for weighted in terms)
    keep = reread or any(weighted.term.num_sweeps > 1 for weighted in terms)
    return LogitBlocks(projections, plan, len(hidden_NH), problem.vocab, dtype, weight_grad_VH, keep)


def _sweep_gradients(
    blocks: LogitBlocks, terms: list[WeightedTerm], grad_total: Tensor, hidden_grad_NH: Tensor | None
) -> None:
    """Add to `hidden_grad_NH` and fill `blocks.weight_grad_VH`, tile by tile of the vocabulary.

    A tile's slice of the weight gradient stores its logits until all its token chunks are done. With one chunk, the product
    then writes the slice directly if it has the slice's dtype. Otherwise a buffer of the tile's size sums the chunks.
    """
    student, weight_grad_VH = blocks.projections["student"], blocks.weight_grad_VH
    for columns, tile in blocks.tiles():
        slice_CH = grad_CH = None if weight_grad_VH is None else weight_grad_VH[columns]
        if slice_CH is not None and (len(tile) != 1 or slice_CH.dtype != student.grad_dtype):
            grad_CH = torch.zeros_like(slice_CH, dtype=blocks.dtype)
        output = student.grad_tile(columns)
        for block in tile:
            grad_RC = _block_gradient(block, terms, grad_total, output.map, student.grad_dtype)
            output.add_gradients(
                grad_RC,
                student.grad_hidden_NH[block.rows],
                hidden_grad_NH=None if hidden_grad_NH is None else hidden_grad_NH[block.rows],
                weight_grad_VH=grad_CH,
                overwrite_weight_grad=block.chunk == 0,
            )
        if slice_CH is not None and grad_CH is not None and grad_CH is not slice_CH:
            slice_CH.copy_(grad_CH)
    if weight_grad_VH is not None:
        weight_grad_VH[blocks.vocab :] = 0


def _block_gradient(
    block: Block, terms: list[WeightedTerm], grad_total: Tensor, map: LogitMap, dtype: torch.dtype
) -> Tensor:
    """d total / d products of the student in one block, in `dtype`; scratch 0 if that is the logits' dtype."""
    first, *others = [(weighted.term, grad_total * (weighted.factor * weighted.weight)) for weighted in terms]
    grad_RC = block.scratch_RC(0)
    if first[0].writes_any_dtype and not others and map.is_identity and dtype != grad_RC.dtype:
        grad_RC = torch.empty_like(grad_RC, dtype=dtype)
    first[0].gradient(block, first[1], grad_RC)
    for term, weight in others:
        term.gradient(block, weight, block.scratch_RC(1))
        grad_RC.add_(block.scratch_RC(1))
    if not map.is_identity:
        map.pull_back(grad_RC, block.student_RC)
    return grad_RC.to(dtype)
