"""Logits in blocks of tokens by vocabulary rows, recomputed instead of stored, so that no full logit tensor exists.

Legend: N tokens, V vocabulary rows of this rank, H hidden size, R rows (tokens) and C columns (vocabulary) of a block.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from minitron_train.config.distill import check_blocks
from minitron_train.model.vocabulary import OutputLayer, bf16_operands

Role = Literal["student", "teacher"]

NUM_WORK_BUFFERS = 4  # blocks held at once: student, teacher, two scratch (JSD: two more)
BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}  # a block fits a CPU's cache, and occupies a whole GPU
TOKEN_CHUNK = {"cpu": 512, "cuda": 4096}  # larger chunks do not speed up the products
MIN_TOKEN_CHUNK = 64
MIN_VOCAB_TILE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunking:
    """Memory that the loss may use beyond its inputs and their gradients, and the block's shape (None: chosen here).

    `logit_memory_fraction` is in units of U, the bytes of this rank's [N, V] logit tensor in fp32. The budget that working
    blocks leave over caches logits between the sweeps, so that fewer are computed twice.
    """

    logit_memory_fraction: float = 0.2
    vocab_tile: int | None = None
    token_chunk: int | None = None

    def validate(self) -> None:
        """Reject a negative budget, and blocks without a row or column."""
        check_blocks(self)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Shape of a block, and how many bytes of logits may be cached between sweeps."""

    token_chunk: int
    vocab_tile: int
    keep_bytes: int


class Projection:
    """One model's hidden states [N, H] and output layer [V, H], whose product is summed in fp32 (or fp64).

    A GPU multiplies low-precision matrices and sums in fp32. A CPU has no such product. There, bf16 matrices are widened
    and multiplied with `bf16_operands`, which loses nothing. The gradients of bf16 matrices are products in bf16: they end
    in bf16 anyway. All other matrices are widened on a CPU and multiplied in fp32.

    Attributes:
        dtype: dtype of both factors of the logits.
        grad_dtype: dtype of both factors of the gradients.
    """

    def __init__(self, hidden_NH: Tensor, output: OutputLayer, logit_dtype: torch.dtype) -> None:
        weight_dtype = output.weight_VH.dtype
        on_cpu = hidden_NH.device.type == "cpu"
        self.is_bf16 = hidden_NH.dtype == weight_dtype == torch.bfloat16
        self.dtype = logit_dtype if on_cpu else weight_dtype
        self.grad_dtype = weight_dtype if self.is_bf16 else self.dtype
        self.hidden_NH = hidden_NH.to(self.dtype)
        self.grad_hidden_NH = hidden_NH.to(self.grad_dtype)
        self.output = output
        self.logit_dtype = logit_dtype
        self.widened: dict[int, OutputLayer] = {}  # the last tile by its first row, for all its blocks

    @property
    def width(self) -> int:
        """The model's hidden size."""
        return self.hidden_NH.shape[1]

    @property
    def widened_width(self) -> int:
        """Elements of one widened row of the weights; 0 where they are multiplied as they are."""
        return self.width if self.output.weight_VH.dtype != self.dtype else 0

    def logits(self, rows: slice, columns: slice, out_RC: Tensor) -> None:
        """Write the logits of one block."""
        if columns.start not in self.widened:
            self.widened = {columns.start: self.output.rows(columns, self.dtype)}
        with bf16_operands() if self.is_bf16 else nullcontext():
            self.widened[columns.start].logits(self.hidden_NH[rows], out_RC)

    def grad_tile(self, columns: slice) -> OutputLayer:
        """Some rows of the output layer, in the dtype of the gradients' products."""
        return self.output.rows(columns, self.grad_dtype)


def plan_blocks(
    chunking: Chunking, num_tokens: int, vocab: int, projections: dict[Role, Projection], weight_grad_VH: Tensor | None
) -> BlockPlan:
    """Choose the block's shape for `num_tokens` x `vocab` logits.

    Token chunks are equal parts of the tokens. A chunk's logits fit into the storage of the weight gradient (see
    `LogitBlocks`). Working memory takes at most half of the budget.
    """
    student = projections["student"]
    weight_VH, dtype, width = student.output.weight_VH, student.logit_dtype, student.width
    device = weight_VH.device.type
    num_tokens, vocab = max(num_tokens, 1), max(vocab, 1)
    budget = int(chunking.logit_memory_fraction * num_tokens * vocab * 4)
    most = TOKEN_CHUNK.get(device, TOKEN_CHUNK["cuda"])
    free_rows = 0 if weight_grad_VH is None else width * weight_grad_VH.itemsize // dtype.itemsize
    if free_rows >= MIN_TOKEN_CHUNK:
        most = min(most, free_rows)
    rows = min(chunking.token_chunk or _equal_part(num_tokens, most), num_tokens)
    column_bytes = _column_bytes(rows, projections, weight_grad_VH, rows < num_tokens)
    elements = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cuda"])
    automatic = max(min(elements // rows, budget // (2 * column_bytes)), MIN_VOCAB_TILE)
    automatic -= automatic % MIN_VOCAB_TILE  # a GPU multiplies unaligned tiles at a third of the speed
    columns = min(chunking.vocab_tile or automatic, vocab)
    return BlockPlan(rows, columns, max(0, budget - column_bytes * columns))


def _column_bytes(
    rows: int, projections: dict[Role, Projection], weight_grad_VH: Tensor | None, several_chunks: bool
) -> int:
    """Working memory for each column of a block: buffers, widened weights, and what the gradients' products need."""
    student = projections["student"]
    wide, narrow = student.logit_dtype.itemsize, student.grad_dtype.itemsize
    found = NUM_WORK_BUFFERS * rows * wide
    found += wide * sum(projection.widened_width for projection in projections.values())
    if narrow != wide:
        found += rows * narrow  # the rounded gradient of the logits
    if weight_grad_VH is not None and (several_chunks or weight_grad_VH.dtype != student.grad_dtype):
        found += student.width * (wide + (narrow if narrow != wide else 0))  # the chunks' sum, and one product
    return found


def _equal_part(total: int, most: int) -> int:
    """The largest size of equal parts of `total` that does not exceed `most`: 768 with at most 512 gives 384."""
    num_parts = -(-total // most)
    return -(-total // num_parts)


@dataclass(slots=True)
class Block:
    """Logits of some tokens and some of this rank's vocabulary, computed at the first access."""

    blocks: "LogitBlocks"
    chunk: int
    rows: slice
    columns: slice

    @property
    def student_RC(self) -> Tensor:
        """The student's logits; read-only."""
        return self.blocks.logits(self, "student")

    @property
    def teacher_RC(self) -> Tensor:
        """The teacher's logits; the last sweep may overwrite them."""
        return self.blocks.logits(self, "teacher")

    def scratch_RC(self, index: int) -> Tensor:
        """An uninitialised buffer of the block's shape, shared by all blocks."""
        return self.blocks.work_buffer(f"scratch{index}", self)


@dataclass(slots=True)
class LogitBlocks:
    """The grid of logit blocks of both models, swept once or several times.

    A block's logits are stored in one of three places. `weight_grad_VH` is the uninitialised gradient of the student's
    output weights. Until a tile's gradient is written to its slice, the slice stores that tile's logits without extra
    memory. With N <= H all of the student's logits fit there, with 2 N <= H the teacher's too. A cache of
    `plan.keep_bytes` stores more. All other blocks are recomputed in every sweep, into a working buffer.
    """

    projections: dict[Role, Projection]
    plan: BlockPlan
    num_tokens: int
    vocab: int
    dtype: torch.dtype
    weight_grad_VH: Tensor | None
    keep: bool
    kept: dict[tuple[Role, int, int], Tensor] = field(default_factory=dict)
    kept_bytes: int = 0
    work: dict[str, Tensor] = field(default_factory=dict)
    in_work: dict[Role, tuple[int, int]] = field(default_factory=dict)

    def tiles(self) -> Iterator[tuple[slice, list[Block]]]:
        """Yield the tiles of the vocabulary in order, each with its blocks of tokens."""
        for start in range(0, self.vocab, self.plan.vocab_tile):
            columns = slice(start, min(start + self.plan.vocab_tile, self.vocab))
            chunks = range(0, self.num_tokens, self.plan.token_chunk)
            rows = [slice(first, min(first + self.plan.token_chunk, self.num_tokens)) for first in chunks]
            yield columns, [Block(self, chunk, part, columns) for chunk, part in enumerate(rows)]

    def __iter__(self) -> Iterator[Block]:
        """Yield every block once, tile by tile."""
        for _, blocks in self.tiles():
            yield from blocks

    def logits(self, block: Block, role: Role) -> Tensor:
        """One model's logits of a block: from the cache, from the working buffer, or computed now."""
        key = (role, block.columns.start, block.chunk)
        if key in self.kept:
            return self.kept[key]
        place = self._home(block, role) if self.keep else None
        if place is not None:
            self.kept[key] = place
        else:
            place = self.work_buffer(role, block)
            if self.in_work.get(role) == key[1:]:
                return place
            self.in_work[role] = key[1:]
        self.projections[role].logits(block.rows, block.columns, place)
        return place

    def work_buffer(self, name: str, block: Block) -> Tensor:
        """A buffer of the block's shape; the next block overwrites it."""
        num_rows, num_columns = _length(block.rows), _length(block.columns)
        if name not in self.work:
            like = next(iter(self.projections.values())).hidden_NH
            self.work[name] = like.new_empty(self.plan.token_chunk * self.plan.vocab_tile, dtype=self.dtype)
        return self.work[name][: num_rows * num_columns].view(num_rows, num_columns)

    def release(self) -> Tensor | None:
        """Free all memory, disable the cache, and return the weight gradient."""
        weight_grad_VH, self.weight_grad_VH, self.keep = self.weight_grad_VH, None, False
        widened = [projection.widened for projection in self.projections.values()]
        for held in (self.kept, self.work, self.in_work, *widened):
            held.clear()
        return weight_grad_VH

    def _home(self, block: Block, role: Role) -> Tensor | None:
        """Storage for this block's logits until the last sweep, or None."""
        num_rows, num_columns = _length(block.rows), _length(block.columns)
        wider_first = sorted(
            self.projections, key=lambda name: -self.projections[name].width
        )  # costs more to recompute
        before = block.chunk * len(wider_first) + wider_first.index(role)
        start = before * self.plan.token_chunk * num_columns
        free = self._slice_of_gradient(block.columns)
        if start + num_rows * num_columns <= free.numel():
            return free[start : start + num_rows * num_columns].view(num_rows, num_columns)
        num_bytes = num_rows * num_columns * self.dtype.itemsize
        if self.kept_bytes + num_bytes > self.plan.keep_bytes:
            return None
        self.kept_bytes += num_bytes
        return free.new_empty(num_rows, num_columns)

    def _slice_of_gradient(self, columns: slice) -> Tensor:
        """The storage of a tile's weight gradient, viewed as a flat tensor of logits."""
        grad_VH = self.weight_grad_VH
        if grad_VH is None or grad_VH.shape[1] * grad_VH.element_size() % self.dtype.itemsize:
            return next(iter(self.projections.values())).hidden_NH.new_empty(0, dtype=self.dtype)
        return grad_VH[columns].view(-1).view(self.dtype)


def _length(part: slice) -> int:
    return part.stop - part.start
