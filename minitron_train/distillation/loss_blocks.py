"""Logits in blocks of tokens by vocabulary, made again instead of kept: far less memory than one full logit tensor.

Legend: N tokens, V vocabulary rows of this rank, H hidden size, R rows (tokens) and C columns (vocabulary) of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from minitron_train.config.distill import check_blocks

Role = Literal["student", "teacher"]

NUM_WORK_BUFFERS = 4  # blocks that exist at once: student, teacher, two scratch (JSD: two more)
BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}  # elementwise passes stay in the cache on a CPU, and fill a GPU
TOKEN_CHUNK = {"cpu": 512, "cuda": 4096}  # more rows do not make the products faster
MIN_TOKEN_CHUNK = 64
MIN_VOCAB_TILE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunking:
    """How much memory the loss may use beyond its inputs and their gradients; the block's shape, chosen when left out.

    `logit_memory_fraction` counts U, the bytes of one [N, V] logit tensor of this rank in fp32. What working blocks leave of
    it keeps logits between the sweeps, so that fewer are computed twice.
    """

    logit_memory_fraction: float = 0.2
    vocab_tile: int | None = None
    token_chunk: int | None = None

    def validate(self) -> None:
        """A budget that is not negative, and blocks of at least one row and column."""
        check_blocks(self)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Block shape and how many bytes of logits may be kept between sweeps."""

    token_chunk: int
    vocab_tile: int
    keep_bytes: int


class Projection:
    """One model's output layer: hidden states [N, H] and this rank's weights [V, H], multiplied into fp32 (or fp64).

    A GPU multiplies low-precision matrices as they are and sums in fp32; a CPU has no such product, so the tile of the
    weights is widened first.
    """

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, compute_dtype: torch.dtype) -> None:
        self.widen = hidden_NH.device.type == "cpu" or hidden_NH.dtype == weight_VH.dtype == compute_dtype
        self.hidden_NH = hidden_NH.to(compute_dtype if self.widen else weight_VH.dtype)
        self.weight_VH = weight_VH
        self.compute_dtype = compute_dtype

    @property
    def width(self) -> int:
        """The model's hidden size."""
        return self.weight_VH.shape[1]

    def weight_tile(self, columns: slice) -> Tensor:
        """Rows of the output weights, ready for a product."""
        tile_CH = self.weight_VH[columns]
        return tile_CH.to(self.compute_dtype) if self.widen else tile_CH

    def logits(self, rows: slice, columns: slice, out_RC: Tensor) -> None:
        """hidden @ weight^T of one block."""
        multiply(self.hidden_NH[rows], self.weight_tile(columns).T, out_RC)


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = left @ right, or out += left @ right; operands of one dtype, the result of the same or a wider one."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif add:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def plan_blocks(
    chunking: Chunking, num_tokens: int, vocab: int, student: Projection, weight_grad_VH: Tensor | None
) -> BlockPlan:
    """Choose the block's shape for `num_tokens` x `vocab` logits.

    Token chunks are equal parts of the tokens. They do not exceed the rows of logits that fit into the storage of the
    weight gradient (`LogitBlocks`), so that whole blocks fit. Working memory takes at most half of the budget.
    """
    device, dtype, width = student.weight_VH.device.type, student.compute_dtype, student.width
    num_tokens, vocab = max(num_tokens, 1), max(vocab, 1)
    budget = int(chunking.logit_memory_fraction * num_tokens * vocab * 4)
    most = TOKEN_CHUNK.get(device, TOKEN_CHUNK["cuda"])
    free_rows = 0 if weight_grad_VH is None else width * weight_grad_VH.itemsize // dtype.itemsize
    if free_rows >= MIN_TOKEN_CHUNK:
        most = min(most, free_rows)
    rows = min(chunking.token_chunk or _equal_part(num_tokens, most), num_tokens)
    narrow = student.weight_VH.dtype != dtype
    summed_apart = weight_grad_VH is not None and (narrow or rows < num_tokens)
    column_bytes = (NUM_WORK_BUFFERS * rows + (summed_apart + narrow) * width) * dtype.itemsize
    elements = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cuda"])
    automatic = max(min(elements // rows, budget // (2 * column_bytes)), MIN_VOCAB_TILE)
    automatic -= automatic % MIN_VOCAB_TILE  # a GPU multiplies unaligned tiles at a third of its rate
    columns = min(chunking.vocab_tile or automatic, vocab)
    return BlockPlan(rows, columns, max(0, budget - column_bytes * columns))


def _equal_part(total: int, most: int) -> int:
    """Size of equal parts of `total`, each at most `most`: 768 in parts of at most 512 is 384."""
    num_parts = -(-total // most)
    return -(-total // num_parts)


@dataclass(slots=True)
class Block:
    """Logits of some tokens and some of this rank's vocabulary, computed when they are first asked for."""

    blocks: "LogitBlocks"
    chunk: int
    rows: slice
    columns: slice

    @property
    def student_RC(self) -> Tensor:
        """The student's logits; not to be written to."""
        return self.blocks.logits(self, "student")

    @property
    def teacher_RC(self) -> Tensor:
        """The teacher's logits; may be overwritten in the last sweep."""
        return self.blocks.logits(self, "teacher")

    def scratch_RC(self, index: int) -> Tensor:
        """An uninitialised buffer of the block's shape; made when first asked for."""
        return self.blocks.work_buffer(f"scratch{index}", self)


@dataclass(slots=True)
class LogitBlocks:
    """The grid of logit blocks of both models, swept once or several times.

    A block's logits live in one of three places. `weight_grad_VH` is the uninitialised gradient of the student's output
    weights: until a tile's gradient is written to its slice, the slice holds that tile's logits, at no cost. With
    N <= H these are all of the student's logits, with 2 N <= H the teacher's too. `plan.keep_bytes` more are kept
    beside. What fits in neither is computed into a working buffer, in every sweep again.
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
        """Tiles of the vocabulary in order, each with its blocks of tokens."""
        for start in range(0, self.vocab, self.plan.vocab_tile):
            columns = slice(start, min(start + self.plan.vocab_tile, self.vocab))
            chunks = range(0, self.num_tokens, self.plan.token_chunk)
            rows = [slice(first, min(first + self.plan.token_chunk, self.num_tokens)) for first in chunks]
            yield columns, [Block(self, chunk, part, columns) for chunk, part in enumerate(rows)]

    def __iter__(self) -> Iterator[Block]:
        """Every block once, for a sweep that keeps the logits."""
        for _, blocks in self.tiles():
            yield from blocks

    def logits(self, block: Block, role: Role) -> Tensor:
        """One model's logits of a block: kept ones, those of the working buffer, or computed now."""
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
        """A buffer of the block's shape that the next block uses again."""
        num_rows, num_columns = _length(block.rows), _length(block.columns)
        if name not in self.work:
            like = next(iter(self.projections.values())).hidden_NH
            self.work[name] = like.new_empty(self.plan.token_chunk * self.plan.vocab_tile, dtype=self.dtype)
        return self.work[name][: num_rows * num_columns].view(num_rows, num_columns)

    def release(self) -> Tensor | None:
        """Let go of all memory and keep nothing from now on; returns the weight gradient."""
        weight_grad_VH, self.weight_grad_VH, self.keep = self.weight_grad_VH, None, False
        for held in (self.kept, self.work, self.in_work):
            held.clear()
        return weight_grad_VH

    def _home(self, block: Block, role: Role) -> Tensor | None:
        """Where this block's logits may stay until the last sweep, or None."""
        num_rows, num_columns = _length(block.rows), _length(block.columns)
        wider_first = sorted(self.projections, key=lambda name: -self.projections[name].width)  # dearer to make again
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
        """The storage of a tile's weight gradient as a flat tensor of logits."""
        grad_VH = self.weight_grad_VH
        if grad_VH is None or grad_VH.shape[1] * grad_VH.element_size() % self.dtype.itemsize:
            return next(iter(self.projections.values())).hidden_NH.new_empty(0, dtype=self.dtype)
        return grad_VH[columns].view(-1).view(self.dtype)


def _length(part: slice) -> int:
    return part.stop - part.start
