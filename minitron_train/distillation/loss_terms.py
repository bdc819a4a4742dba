"""The fused losses, as sums over blocks of logits.

In every sweep a term adds each block [R, C] to sums per row (`observe`). After a sweep it combines the sums over the
tensor-parallel ranks (`reduce`), which gives the loss of every row. In the last sweep it writes the gradient with respect
to the student's logits block by block (`gradient`). With s, t the two models' logits, p = softmax(s / T), q = softmax(t / T):

    term            loss of a row                         gradient with respect to s
    forward KL      sum q (log q - log p)                 (p - q) / T
    reverse KL      sum p (log p - log q)                 p (log p - log q - loss) / T
    JSD             b KL(q | m) + (1-b) KL(p | m)         (1-b) p (log p - log m - KL(p | m)) / T,   m = b q + (1-b) p
    MSE             mean (s - t)^2                        2 (s - t) / V
    cosine          1 - s.t / (|s| |t|)                   ((1 - loss) s / |s| - t / |t|) / |s|
    top-k KL        forward KL over the teacher's k largest logits, p and q renormalised over them
    cross-entropy   -log softmax(s)[label]                softmax(s) - onehot(label)

Sums over the vocabulary are held per row in fp64. Probabilities are exp(x - row maximum) / sum, not exp(x - logsumexp),
because logsumexp in fp32 has an error of 1e-6 that would affect the whole row.

Legend: N tokens, R rows and C columns of a block, K kept logits, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_train.distillation.loss_blocks import Block

Group = dist.ProcessGroup | None


def all_reduce(values: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce over the tensor-parallel group, in place; None means a single rank."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


class Term(ABC):
    """One loss per row, computed in `num_sweeps` sweeps over the blocks; `gradient` takes one more."""

    num_sweeps: ClassVar[int] = 1
    gradient_reads_logits: ClassVar[bool] = True
    writes_any_dtype: ClassVar[bool] = False  # `gradient` may get an `out_RC` of a narrower dtype than the logits
    loss_N: Tensor

    @abstractmethod
    def observe(self, sweep: int, block: Block) -> None:
        """Add one block to the sums of its rows."""

    @abstractmethod
    def reduce(self, sweep: int, group: Group) -> None:
        """Combine the sums over the tensor-parallel ranks; after the last sweep this sets `loss_N`."""

    @abstractmethod
    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """Write weight x d loss / d student logits into `out_RC`, which is the block's scratch 0 or 1.

        It is called once per block and may overwrite the teacher's logits. Scratch 1 is free when `out_RC` is scratch 0.
        A term that `writes_any_dtype` may get another buffer; both scratches are free then.
        """


class RunningSoftmax:
    """Sums of exp((x - m) / T) over the blocks of a row, where m is the largest logit so far; rescaled when m grows.

    `sums_KN`[0] is the normaliser. A term may add further sums of exp((x - m) / T) times another value.
    """

    def __init__(self, like_N: Tensor, temperature: float, num_sums: int = 1) -> None:
        self.temperature = temperature
        self.max_N = torch.full_like(like_N, -math.inf)
        self.sums_KN = like_N.new_zeros((num_sums, len(like_N)), dtype=torch.float64)

    def observe(self, rows: slice, logits_RC: Tensor, out_RC: Tensor) -> None:
        """Add a block, and write its exp((x - m) / T) to `out_RC`."""
        self.rescale(rows, torch.maximum(self.max_N[rows], logits_RC.amax(dim=1)))
        self.exp(rows, logits_RC, out_RC)
        self.sums_KN[0, rows] += out_RC.sum(dim=1)

    def rescale(self, rows: slice, max_R: Tensor) -> None:
        """Refer the rows' sums to a new maximum, which is not smaller than the old one."""
        self.sums_KN[:, rows] *= ((self.max_N[rows] - max_R).double() / self.temperature).exp()
        self.max_N[rows] = max_R

    def exp(self, rows: slice, logits_RC: Tensor, out_RC: Tensor) -> None:
        """Probabilities times the normaliser."""
        torch.sub(logits_RC, self.max_N[rows, None], out=out_RC)
        if self.temperature != 1:
            out_RC.div_(self.temperature)
        out_RC.exp_()

    def log_probabilities(self, rows: slice, logits_RC: Tensor, shift: float, out_RC: Tensor) -> None:
        """log softmax(x / T) + shift."""
        torch.sub(logits_RC, self.max_N[rows, None], out=out_RC).div_(self.temperature)
        out_RC.sub_((self.sums_KN[0, rows].log() - shift).to(out_RC.dtype)[:, None])

    @property
    def log_normaliser_N(self) -> Tensor:
        """logsumexp(x / T), in fp64."""
        return self.max_N.double() / self.temperature + self.sums_KN[0].log()

    def mean_N(self, index: int) -> Tensor:
        """Expectation under softmax(x / T) of the value that sum `index` accumulates, in fp64."""
        return self.sums_KN[index] / self.sums_KN[0]

    def scale(self, rows: slice, weight: Tensor) -> Tensor:
        """weight / normaliser as a column; multiplied by `exp` it gives weighted probabilities."""
        return (weight.double() / self.sums_KN[0, rows]).to(self.max_N.dtype)[:, None]


def reduce_softmaxes(group: Group, *softmaxes: RunningSoftmax) -> None:
    """Rescale the ranks' sums to their common maximum and add them; two collectives in total."""
    if group is None or group.size() == 1:
        return
    largest = all_reduce(torch.stack([softmax.max_N for softmax in softmaxes]), group, dist.ReduceOp.MAX)
    for softmax, max_N in zip(softmaxes, largest, strict=True):
        softmax.sums_KN *= ((softmax.max_N - max_N).double() / softmax.temperature).exp()
        softmax.max_N = max_N
    sums = all_reduce(torch.cat([softmax.sums_KN for softmax in softmaxes]), group)
    for softmax, part in zip(softmaxes, sums.split([len(softmax.sums_KN) for softmax in softmaxes]), strict=True):
        softmax.sums_KN = part


class ForwardKL(Term):
    """KL(teacher || student); its row sum is logZ_s - logZ_t + E_q[t - s] / T."""

    def __init__(self, like_N: Tensor, temperature: float) -> None:
        self.student = RunningSoftmax(like_N, temperature)
        self.teacher = RunningSoftmax(like_N, temperature, num_sums=2)

    def observe(self, sweep: int, block: Block) -> None:
        """Both normalisers, and exp(t) (t - s)."""
        student_RC, teacher_RC, rows = block.student_RC, block.teacher_RC, block.rows
        exp_RC, difference_RC = block.scratch_RC(0), block.scratch_RC(1)
        self.student.observe(rows, student_RC, exp_RC)
        self.teacher.observe(rows, teacher_RC, exp_RC)
        self.teacher.sums_KN[1, rows] += torch.sub(teacher_RC, student_RC, out=difference_RC).mul_(exp_RC).sum(dim=1)

    def reduce(self, sweep: int, group: Group) -> None:
        """The loss of every row."""
        reduce_softmaxes(group, self.student, self.teacher)
        mean_N = self.teacher.mean_N(1) / self.teacher.temperature
        self.loss_N = mean_N + self.student.log_normaliser_N - self.teacher.log_normaliser_N

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """p - q."""
        teacher_RC, rows, weight = block.teacher_RC, block.rows, weight / self.student.temperature
        self.student.exp(rows, block.student_RC, out_RC)
        self.teacher.exp(rows, teacher_RC, teacher_RC)
        out_RC.mul_(self.student.scale(rows, weight)).addcmul_(teacher_RC, self.teacher.scale(rows, -weight))


class ReverseKL(Term):
    """KL(student || teacher); the gradient is p (s - t - E_p[s - t]) / T^2."""

    def __init__(self, like_N: Tensor, temperature: float) -> None:
        self.student = RunningSoftmax(like_N, temperature, num_sums=2)
        self.teacher = RunningSoftmax(like_N, temperature)

    def observe(self, sweep: int, block: Block) -> None:
        """Both normalisers, and exp(s) (s - t)."""
        student_RC, teacher_RC, rows = block.student_RC, block.teacher_RC, block.rows
        exp_RC, difference_RC = block.scratch_RC(0), block.scratch_RC(1)
        self.teacher.observe(rows, teacher_RC, exp_RC)
        self.student.observe(rows, student_RC, exp_RC)
        self.student.sums_KN[1, rows] += torch.sub(student_RC, teacher_RC, out=difference_RC).mul_(exp_RC).sum(dim=1)

    def reduce(self, sweep: int, group: Group) -> None:
        """The loss of every row."""
        reduce_softmaxes(group, self.student, self.teacher)
        mean_N = self.student.mean_N(1) / self.student.temperature
        self.loss_N = mean_N - self.student.log_normaliser_N + self.teacher.log_normaliser_N

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """p (s - t - E_p[s - t]) / T^2: the log normalisers cancel."""
        student_RC, teacher_RC, rows = block.student_RC, block.teacher_RC, block.rows
        mean_R = self.student.mean_N(1)[rows].to(out_RC.dtype)
        torch.sub(student_RC, teacher_RC, out=out_RC).sub_(mean_R[:, None])
        self.student.exp(rows, student_RC, teacher_RC)
        out_RC.mul_(teacher_RC).mul_(self.student.scale(rows, weight / self.student.temperature**2))


class JensenShannon(Term):
    """b KL(q | m) + (1-b) KL(p | m), m = b q + (1-b) p; A = log (1-b) p, B = log b q, so log m = logaddexp(A, B)."""

    num_sweeps = 2

    def __init__(self, like_N: Tensor, temperature: float, beta: float) -> None:
        self.student, self.teacher = RunningSoftmax(like_N, temperature), RunningSoftmax(like_N, temperature)
        self.beta = beta
        self.sums_KN = self.student.sums_KN.new_zeros((2, len(like_N)))

    def observe(self, sweep: int, block: Block) -> None:
        """First the normalisers, then sum exp(A) (A - log m) and sum exp(B) (B - log m)."""
        first_RC, second_RC = block.scratch_RC(0), block.scratch_RC(1)
        if sweep == 0:
            self.student.observe(block.rows, block.student_RC, first_RC)
            self.teacher.observe(block.rows, block.teacher_RC, first_RC)
            return
        self._log_weighted(block, first_RC, second_RC)
        mixture_RC = torch.logaddexp(first_RC, second_RC, out=block.scratch_RC(2))
        for index, log_RC in enumerate((first_RC, second_RC)):
            ratio_RC = torch.sub(log_RC, mixture_RC, out=block.scratch_RC(3))
            self.sums_KN[index, block.rows] += ratio_RC.mul_(log_RC.exp_()).sum(dim=1)

    def _log_weighted(self, block: Block, student_out_RC: Tensor, teacher_out_RC: Tensor) -> None:
        """A and B."""
        self.student.log_probabilities(block.rows, block.student_RC, math.log(1 - self.beta), student_out_RC)
        self.teacher.log_probabilities(block.rows, block.teacher_RC, math.log(self.beta), teacher_out_RC)

    def reduce(self, sweep: int, group: Group) -> None:
        """The loss of every row, after the second sweep."""
        if sweep == 0:
            reduce_softmaxes(group, self.student, self.teacher)
            return
        all_reduce(self.sums_KN, group)
        entropy = -self.beta * math.log(self.beta) - (1 - self.beta) * math.log(1 - self.beta)
        self.loss_N = self.sums_KN.sum(dim=0) + entropy

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """exp(A) (A - log m - E_p[A - log m]) / T."""
        log_RC, mixture_RC = block.scratch_RC(2), block.teacher_RC
        self._log_weighted(block, log_RC, mixture_RC)
        torch.logaddexp(log_RC, mixture_RC, out=mixture_RC)
        mean_R = (self.sums_KN[0, block.rows] / (1 - self.beta)).to(out_RC.dtype)
        torch.sub(log_RC, mixture_RC, out=out_RC).sub_(mean_R[:, None])
        out_RC.mul_(log_RC.exp_()).mul_(weight / self.student.temperature)


class MeanSquaredError(Term):
    """Mean over the vocabulary of the squared difference of the logits."""

    def __init__(self, like_N: Tensor, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.loss_N = torch.zeros_like(like_N, dtype=torch.float64)

    def observe(self, sweep: int, block: Block) -> None:
        """Sum of squares."""
        difference_RC = torch.sub(block.student_RC, block.teacher_RC, out=block.scratch_RC(0))
        self.loss_N[block.rows] += difference_RC.square_().sum(dim=1)

    def reduce(self, sweep: int, group: Group) -> None:
        """The loss of every row."""
        self.loss_N = all_reduce(self.loss_N, group) / self.vocab_size

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """2 (s - t) / V."""
        torch.sub(block.student_RC, block.teacher_RC, out=out_RC).mul_(2 * weight / self.vocab_size)


class Cosine(Term):
    """1 - cos(s, t) of the logit vectors."""

    def __init__(self, like_N: Tensor) -> None:
        self.products_KN = like_N.new_zeros((3, len(like_N)), dtype=torch.float64)  # s.s, t.t, s.t

    def observe(self, sweep: int, block: Block) -> None:
        """The three inner products."""
        student_RC, teacher_RC, product_RC = block.student_RC, block.teacher_RC, block.scratch_RC(0)
        pairs = (student_RC, student_RC), (teacher_RC, teacher_RC), (student_RC, teacher_RC)
        for index, (left_RC, right_RC) in enumerate(pairs):
            self.products_KN[index, block.rows] += torch.mul(left_RC, right_RC, out=product_RC).sum(dim=1)

    def reduce(self, sweep: int, group: Group) -> None:
        """The loss of every row."""
        student_N, teacher_N, both_N = all_reduce(self.products_KN, group)
        self.student_square_N = student_N.clamp_min(1e-16)
        self.norms_N = (self.student_square_N * teacher_N.clamp_min(1e-16)).sqrt()
        self.loss_N = 1 - both_N / self.norms_N

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """cos s / |s|^2 - t / (|s| |t|)."""
        rows, weight = block.rows, weight.double()
        student_R = weight * (1 - self.loss_N[rows]) / self.student_square_N[rows]
        teacher_R = -weight / self.norms_N[rows]
        torch.mul(block.student_RC, student_R.to(out_RC.dtype)[:, None], out=out_RC)
        out_RC.addcmul_(block.teacher_RC, teacher_R.to(out_RC.dtype)[:, None])


class TopKKL(Term):
    """Forward KL over the teacher's K largest logits of the whole vocabulary, both models renormalised over them.

    Each rank keeps the K largest logits of its own shard and their columns. The ranks then select the K largest of all.
    """

    gradient_reads_logits = False

    def __init__(self, like_N: Tensor, temperature: float, top_k: int) -> None:
        self.temperature = temperature
        self.teacher_NK = like_N.new_full((len(like_N), top_k), -math.inf)
        self.student_NK = torch.zeros_like(self.teacher_NK)
        self.column_NK = torch.full_like(self.teacher_NK, -1, dtype=torch.int64)

    def observe(self, sweep: int, block: Block) -> None:
        """Merge the block's logits into the K largest so far."""
        rows, top_k = block.rows, self.teacher_NK.shape[1]
        candidates = torch.cat([self.teacher_NK[rows], block.teacher_RC], dim=1)
        self.teacher_NK[rows], place_RK = candidates.topk(top_k, dim=1, sorted=False)
        old_RK, new_RK = place_RK.clamp_max(top_k - 1), (place_RK - top_k).clamp_min(0)
        is_old_RK = place_RK < top_k
        column_RK, student_RK = self.column_NK[rows].gather(1, old_RK), self.student_NK[rows].gather(1, old_RK)
        self.column_NK[rows] = torch.where(is_old_RK, column_RK, new_RK + block.columns.start)
        self.student_NK[rows] = torch.where(is_old_RK, student_RK, block.student_RC.gather(1, new_RK))

    def reduce(self, sweep: int, group: Group) -> None:
        """Select the K largest of all ranks; compute the loss of every row and its gradient at those logits."""
        chosen_NK = self._chosen(group)
        log_q_NK = self._log_softmax(self.teacher_NK, chosen_NK, group)
        log_p_NK = self._log_softmax(self.student_NK, chosen_NK, group)
        terms_NK = torch.where(chosen_NK, log_q_NK.exp() * (log_q_NK - log_p_NK), 0)
        self.loss_N = all_reduce(terms_NK.sum(dim=1, dtype=torch.float64), group)
        self.gradient_NK = torch.where(chosen_NK, log_p_NK.exp() - log_q_NK.exp(), 0) / self.temperature

    def _chosen(self, group: Group) -> Tensor:
        """Which of this rank's candidates are among the K largest of all ranks."""
        if group is None or group.size() == 1:
            return torch.ones_like(self.teacher_NK, dtype=torch.bool)
        shards = [torch.empty_like(self.teacher_NK) for _ in range(group.size())]
        dist.all_gather(shards, self.teacher_NK, group=group)
        everyone = torch.cat(shards, dim=1)
        largest = everyone.topk(self.teacher_NK.shape[1], dim=1, sorted=False).indices
        chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, largest, True)
        return chosen.chunk(group.size(), dim=1)[group.rank()]

    def _log_softmax(self, logits_NK: Tensor, chosen_NK: Tensor, group: Group) -> Tensor:
        """log softmax over the chosen logits of all ranks."""
        scaled_NK = torch.where(chosen_NK, logits_NK / self.temperature, -math.inf)
        max_N = all_reduce(scaled_NK.amax(dim=1), group, dist.ReduceOp.MAX)
        shifted_NK = scaled_NK - max_N[:, None]
        sum_N = all_reduce(shifted_NK.exp().sum(dim=1, dtype=torch.float64), group)
        return shifted_NK - sum_N.log().to(shifted_NK.dtype)[:, None]

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """p - q at the chosen logits, zero elsewhere."""
        column_RK = self.column_NK[block.rows] - block.columns.start
        scatter_inside(out_RC.zero_(), column_RK, self.gradient_NK[block.rows] * weight)


class CrossEntropy(Term):
    """Cross-entropy on labels, at temperature 1."""

    def __init__(self, like_N: Tensor, label_column_N: Tensor) -> None:
        self.student = RunningSoftmax(like_N, temperature=1)
        self.label_column_N = label_column_N  # relative to this rank's vocabulary; on other ranks it is out of range
        self.label_logit_N = torch.zeros_like(like_N)

    def observe(self, sweep: int, block: Block) -> None:
        """The normaliser, and the label's logit if this block contains it."""
        student_RC, rows = block.student_RC, block.rows
        self.student.observe(rows, student_RC, block.scratch_RC(0))
        column_R1 = (self.label_column_N[rows] - block.columns.start)[:, None]
        logit_R1 = student_RC.gather(1, column_R1.clamp(0, student_RC.shape[1] - 1))
        self.label_logit_N[rows] += torch.where(is_inside(column_R1, student_RC), logit_R1, 0)[:, 0]

    def reduce(self, sweep: int, group: Group) -> None:
        """The loss of every row."""
        reduce_softmaxes(group, self.student)
        self.loss_N = self.student.log_normaliser_N - all_reduce(self.label_logit_N, group).double()

    def gradient(self, block: Block, weight: Tensor, out_RC: Tensor) -> None:
        """softmax(s) - onehot(label)."""
        self.student.exp(block.rows, block.student_RC, out_RC)
        out_RC.mul_(self.student.scale(block.rows, weight))
        column_R1 = (self.label_column_N[block.rows] - block.columns.start)[:, None]
        scatter_inside(out_RC, column_R1, -weight.to(out_RC.dtype).expand(column_R1.shape))


def is_inside(column_RK: Tensor, block_RC: Tensor) -> Tensor:
    """Which column numbers lie inside the block."""
    return (column_RK >= 0) & (column_RK < block_RC.shape[1])


def scatter_inside(out_RC: Tensor, column_RK: Tensor, values_RK: Tensor) -> None:
    """Add values at their columns; columns outside the block are skipped."""
    inside_RK = is_inside(column_RK, out_RC)
    out_RC.scatter_add_(1, column_RK.clamp(0, out_RC.shape[1] - 1), torch.where(inside_RK, values_RK, 0))
