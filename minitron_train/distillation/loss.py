"""The distillation loss, fused with the output layers: it takes hidden states and never holds a full logit tensor.

One sweep over blocks of logits computes the loss of each row. A second sweep forms the gradient p_s - p_t block by block
and multiplies it into the gradients of hidden states and output weights (docs/method.md). The second sweep runs in the
backward pass, where the factor of the loss is known. So gradients need no rescaling, and validation does not compute
them.

Legend: N tokens, V output rows of this tensor-parallel rank, H student's hidden size, D teacher's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_train.arch.shape import rows_without_padding
from minitron_train.config import LossKind
from minitron_train.config.distill import check_loss
from minitron_train.distillation import loss_terms
from minitron_train.distillation.loss_autograd import TokenLoss, summed_loss
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.distillation.loss_compiled import forward_kl
from minitron_train.distillation.loss_fused import FusedLoss, Problem, WeightedTerm
from minitron_train.distillation.samples import SampledKL, Samples
from minitron_train.model.vocabulary import PLAIN, LogitMap
from minitron_train.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """The loss of a token: kd_weight x distillation loss + ce_weight x cross-entropy on the label.

    Both models' logits are divided by `temperature`; the cross-entropy has temperature 1. `temperature_squared` multiplies
    the distillation loss by temperature^2, as in Hinton's paper; ModelOpt's loss for Megatron does not. `top_k` applies to
    top_k_kl. `jsd_beta`, the teacher's share of the mixture, applies to jsd. `compile_loss` fuses the passes of forward_kl
    (see `loss_compiled`). `function` replaces `kind` by a user-defined loss (see `loss_autograd`). The other fields have the
    names of section distill, from which training fills them.
    """

    kind: LossKind = LossKind.forward_kl
    temperature: float = 1.0
    temperature_squared: bool = False
    top_k: int = 0
    jsd_beta: float = 0.5
    compile_loss: bool | None = None  # None: on CUDA
    function: TokenLoss | None = None  # replaces `kind`: (student logits, teacher logits) -> loss per token
    kd_weight: float = 1.0
    ce_weight: float = 0.0

    def validate(self) -> None:
        """Reject values out of range, and settings that do not apply to `kind`."""
        check_loss(self, self.kind)
        if self.function is not None and (self.kind, self.temperature, self.top_k) != (LossKind.forward_kl, 1.0, 0):
            raise UserError("function: replaces kind, temperature and top_k; leave them out")


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over the valid tokens, equal on every tensor-parallel rank. Only `total` carries gradients.

    total = kd_weight x kd_sum + ce_weight x ce_sum. With `temperature_squared`, kd_sum includes temperature^2.
    """

    total: Tensor
    kd_sum: Tensor
    ce_sum: Tensor
    num_valid: int


def distillation_loss(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_ND: Tensor | None,
    teacher_weight_VD: Tensor | None,
    *,
    loss: LossSpec,
    samples: Samples | None = None,
    maps: tuple[LogitMap, LogitMap] = (PLAIN, PLAIN),
    mask_N: Tensor | None = None,
    labels_N: Tensor | None = None,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunking: Chunking | None = None,
) -> LossParts:
    """Distillation loss of a student's hidden states against a teacher's, summed over the valid tokens.

    Args:
        student_hidden_NH: the input of the student's output layer, the same on all ranks of `group`. Do not pass it through
            megatron's `copy_to_tensor_model_parallel_region`: the backward pass sums its gradient over the group, and
            nothing may reduce it again. Under sequence parallelism, gather it with `tensor_parallel_output_grad=False`,
            whose backward pass splits.
        student_weight_VH: this rank's rows of the output weights; rank r of the group holds rows r V to (r+1) V.
        teacher_hidden_ND, teacher_weight_VD: the teacher's; no gradients flow to them. None when `loss.kd_weight` is 0.
        samples: what the teacher says about the tokens, in place of its hidden states; the loss is then the forward KL at
            the temperature that they were drawn at.
        maps: what the student's and the teacher's family do to the products of hidden states and output weights.
        mask_N: valid tokens (bool, or nonzero); other tokens are dropped before any product.
        labels_N: token ids for the cross-entropy, required when `loss.ce_weight` is not 0; ignored at masked tokens.
        vocab_size: number of output rows without padding, all ranks together. Padding rows get no probability and no
            gradient. Optional when both models have the same number of rows and no padding.
        group: the tensor-parallel group; None for a single rank.
        chunking: memory budget and block shape; None chooses both.

    Raises:
        UserError: settings that contradict each other, or vocabularies that do not match.
    """
    chunking = chunking or Chunking()
    loss.validate()
    chunking.validate()
    if loss.kd_weight == 0:
        teacher_hidden_ND = teacher_weight_VD = samples = None
    elif samples is not None:
        assert teacher_hidden_ND is None and loss.function is None and loss.kind is LossKind.forward_kl
    elif teacher_hidden_ND is None or teacher_weight_VD is None:
        raise UserError(f"kd_weight={loss.kd_weight}: needs a teacher; give one, or set kd_weight=0")
    vocab = _Vocabulary.of(student_weight_VH, teacher_weight_VD, vocab_size, group, loss.top_k)
    if mask_N is not None and not bool((mask_N != 0).all()):
        valid = (mask_N != 0).nonzero()[:, 0]
        student_hidden_NH = student_hidden_NH[valid]
        teacher_hidden_ND = None if teacher_hidden_ND is None else teacher_hidden_ND[valid]
        labels_N = None if labels_N is None else labels_N[valid]
        samples = None if samples is None else samples.of_tokens(valid)
    if loss.ce_weight:
        _check_labels(labels_N, len(student_hidden_NH), vocab.size)
    teacher = None
    if teacher_hidden_ND is not None and teacher_weight_VD is not None:
        teacher = teacher_hidden_ND.detach(), teacher_weight_VD.detach()
    if loss.function is not None and teacher is not None:
        student = student_hidden_NH, student_weight_VH
        kd_sum = summed_loss(loss.function, student, teacher, maps=maps, vocab_size=vocab.size, group=group)
        return _with_cross_entropy(loss, kd_sum, student, maps, labels_N, vocab, group, chunking)
    problem = Problem(
        make_terms=lambda like_N: _make_terms(loss, vocab, labels_N, samples, like_N),
        teacher=teacher,
        student_map=maps[0],
        teacher_map=maps[1],
        vocab=vocab.local_size,
        group=group,
        chunking=chunking,
        wants_grad=torch.is_grad_enabled() and (student_hidden_NH.requires_grad or student_weight_VH.requires_grad),
    )
    total, kd_sum, ce_sum = FusedLoss.apply(student_hidden_NH, student_weight_VH, problem)
    return LossParts(total, kd_sum, ce_sum, len(student_hidden_NH))


def _with_cross_entropy(
    loss: LossSpec,
    kd_sum: Tensor,
    student: tuple[Tensor, Tensor],
    maps: tuple[LogitMap, LogitMap],
    labels_N: Tensor | None,
    vocab: "_Vocabulary",
    group: dist.ProcessGroup | None,
    chunking: Chunking,
) -> LossParts:
    """Combine a distillation term from autograd with the fused cross-entropy."""
    total, ce_sum = loss.kd_weight * kd_sum, torch.zeros_like(kd_sum)
    if loss.ce_weight:
        labels_only = LossSpec(kd_weight=0.0, ce_weight=loss.ce_weight)
        ce = distillation_loss(
            *student,
            None,
            None,
            loss=labels_only,
            maps=maps,
            labels_N=labels_N,
            vocab_size=vocab.size,
            group=group,
            chunking=chunking,
        )
        total, ce_sum = total + ce.total, ce.ce_sum
    return LossParts(total, kd_sum.detach(), ce_sum, len(student[0]))


MAKE_TERM: dict[LossKind, Callable[[LossSpec, "_Vocabulary", Tensor], loss_terms.Term]] = {
    LossKind.forward_kl: lambda loss, vocab, like_N: forward_kl(like_N, loss.temperature, loss.compile_loss),
    LossKind.reverse_kl: lambda loss, vocab, like_N: loss_terms.ReverseKL(like_N, loss.temperature),
    LossKind.jsd: lambda loss, vocab, like_N: loss_terms.JensenShannon(like_N, loss.temperature, loss.jsd_beta),
    LossKind.mse: lambda loss, vocab, like_N: loss_terms.MeanSquaredError(like_N, vocab.size),
    LossKind.cosine: lambda loss, vocab, like_N: loss_terms.Cosine(like_N),
    LossKind.top_k_kl: lambda loss, vocab, like_N: loss_terms.TopKKL(like_N, loss.temperature, loss.top_k),
}


def _make_terms(
    loss: LossSpec, vocab: "_Vocabulary", labels_N: Tensor | None, samples: Samples | None, like_N: Tensor
) -> dict[str, WeightedTerm]:
    """The terms with a weight that is not zero. The logged loss includes temperature^2."""
    terms = {}
    if loss.kd_weight:
        factor = loss.temperature**2 if loss.temperature_squared else 1.0
        if samples is None:
            term = MAKE_TERM[loss.kind](loss, vocab, like_N)
        else:
            term = SampledKL(like_N, loss.temperature, samples, vocab.start)
        terms["kd"] = WeightedTerm(term, factor, loss.kd_weight)
    if loss.ce_weight:
        assert labels_N is not None
        terms["ce"] = WeightedTerm(loss_terms.CrossEntropy(like_N, labels_N - vocab.start), 1.0, loss.ce_weight)
    return terms


def _check_labels(labels_N: Tensor | None, num_tokens: int, vocab_size: int) -> None:
    if labels_N is None:
        raise UserError("ce_weight: needs labels; give labels or set ce_weight=0")
    assert labels_N.shape == (num_tokens,), f"labels of shape {tuple(labels_N.shape)} for {num_tokens} tokens"
    if bool(((labels_N < 0) | (labels_N >= vocab_size)).any()):
        raise UserError(f"labels: a token id lies outside 0 … {vocab_size - 1}; mask it, or set the right vocab_size")


def real_rows(rows: Mapping[str, int], vocab_size: int | None, num_ranks: int, top_k: int) -> int:
    """The number of output rows without padding. `rows` gives each model's number of rows, all ranks together.

    Raises:
        UserError: the models' rows cannot be matched, or there are fewer than `top_k`.
    """
    named = ", ".join(f"{name} {number}" for name, number in rows.items())
    if len(set(rows.values())) > 1 and num_ranks > 1:
        raise UserError(
            f"output rows ({named}): under tensor parallelism both models need the same number, so that their "
            "shards match; pad both to the same size"
        )
    if len(set(rows.values())) > 1 and vocab_size is None:
        raise UserError(f"output rows ({named}): differ, and the padding is unknown; give vocab_size")
    size = min(rows.values()) if vocab_size is None else vocab_size
    if not 0 < size <= min(rows.values()):
        raise UserError(f"vocab_size={size}: must fit the output rows ({named}); give the tokenizer's size")
    if top_k > size:
        raise UserError(f"top_k={top_k}: the vocabulary has {size} entries; choose at most as many")
    return size


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Output rows without padding: the number on all ranks, this rank's first row, and this rank's number."""

    size: int
    start: int
    local_size: int

    @classmethod
    def of(
        cls,
        student_VH: Tensor,
        teacher_VD: Tensor | None,
        vocab_size: int | None,
        group: dist.ProcessGroup | None,
        top_k: int,
    ) -> "_Vocabulary":
        """Derive it from the weights' shapes; raises what `real_rows` raises."""
        num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        shard = len(student_VH)
        rows = {"student": shard * num_ranks} | ({} if teacher_VD is None else {"teacher": len(teacher_VD) * num_ranks})
        size, start = real_rows(rows, vocab_size, num_ranks, top_k), rank * shard
        return cls(size, start, rows_without_padding(size, rank, shard))
