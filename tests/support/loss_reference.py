"""The distillation losses as one would write them: full logits, autograd, and the dtype of what is given (fp64 in most tests)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_train.config import LossKind
from minitron_train.distillation.loss import LossSpec
from minitron_train.model.vocabulary import PLAIN, LogitMap


@dataclass(frozen=True)
class Case:
    """Random inputs of the loss. Weights have the scale that gives logits a standard deviation of 3."""

    student_NH: Tensor
    student_VH: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    labels_N: Tensor

    def to(self, target: torch.dtype | str) -> "Case":
        """The same numbers in another dtype, or on another device."""
        moved = [t.detach().to(target) for t in (self.student_NH, self.student_VH, self.teacher_ND, self.teacher_VD)]
        labels = self.labels_N.to(target) if isinstance(target, str) else self.labels_N
        return Case(*moved, labels)

    def leaves(self) -> list[Tensor]:
        """The student's tensors, made to gather gradients."""
        return [self.student_NH.requires_grad_(), self.student_VH.requires_grad_()]


def make_case(
    tokens: int, vocab: int, student_hidden: int, teacher_hidden: int, dtype: torch.dtype = torch.float64
) -> Case:
    """Random, but the same in every process."""
    generator = torch.Generator().manual_seed(tokens * 7919 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student, teacher = normal(vocab, student_hidden), normal(vocab, teacher_hidden)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    return Case(
        normal(tokens, student_hidden),
        student * (3 / student_hidden**0.5),
        normal(tokens, teacher_hidden),
        teacher * (3 / teacher_hidden**0.5),
        labels,
    )


def row_losses(
    case: Case, spec: LossSpec, vocab_size: int | None = None, maps: tuple[LogitMap, LogitMap] = (PLAIN, PLAIN)
) -> tuple[Tensor, Tensor]:
    """Distillation loss (with temperature², if asked for) and cross-entropy of every token, from full logits."""
    student_NV = mapped(case.student_NH @ case.student_VH[:vocab_size].T, maps[0])
    teacher_NV = mapped(case.teacher_ND @ case.teacher_VD[:vocab_size].T, maps[1])
    ce_N = F.cross_entropy(student_NV, case.labels_N, reduction="none")
    if spec.function is not None:
        return spec.function(student_NV, teacher_NV), ce_N
    if spec.kind is LossKind.mse:
        return (student_NV - teacher_NV).square().mean(-1), ce_N
    if spec.kind is LossKind.cosine:
        return 1 - F.cosine_similarity(student_NV, teacher_NV, dim=-1), ce_N
    if spec.kind is LossKind.top_k_kl:
        teacher_NV, index = teacher_NV.topk(spec.top_k, dim=-1)
        student_NV = student_NV.gather(-1, index)
    log_p, log_q = (F.log_softmax(logits / spec.temperature, dim=-1) for logits in (student_NV, teacher_NV))
    p, q = log_p.exp(), log_q.exp()
    if spec.kind is LossKind.reverse_kl:
        kd_N = (p * (log_p - log_q)).sum(-1)
    elif spec.kind is LossKind.jsd:
        log_m = torch.logaddexp(log_q + math.log(spec.jsd_beta), log_p + math.log(1 - spec.jsd_beta))
        kd_N = spec.jsd_beta * (q * (log_q - log_m)).sum(-1) + (1 - spec.jsd_beta) * (p * (log_p - log_m)).sum(-1)
    else:
        kd_N = (q * (log_q - log_p)).sum(-1)
    return (kd_N * spec.temperature**2 if spec.temperature_squared else kd_N), ce_N


def mapped(products: Tensor, map: LogitMap) -> Tensor:
    """What a family does to the products of hidden states and output weights."""
    scaled = products / map.divisor
    return scaled if map.softcap is None else map.softcap * torch.tanh(scaled / map.softcap)


def reference(
    case: Case, spec: LossSpec, vocab_size: int | None = None, maps: tuple[LogitMap, LogitMap] = (PLAIN, PLAIN)
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss and its gradients with respect to the student's hidden states and output weights."""
    leaves = case.leaves()
    kd_N, ce_N = row_losses(case, spec, vocab_size, maps)
    total = (spec.kd_weight * kd_N + spec.ce_weight * ce_N).sum()
    hidden_grad, weight_grad = torch.autograd.grad(total, leaves)
    return total.detach(), hidden_grad, weight_grad


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def huber(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """A loss that somebody else might write, of log-probabilities: [N]."""
    log_p, log_q = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    return F.huber_loss(log_p, log_q, reduction="none").mean(-1)


def specs() -> list[LossSpec]:
    """Every kind, with whatever it takes besides, alone and mixed with cross-entropy."""
    base = [
        {"kind": LossKind.forward_kl},
        {"kind": LossKind.forward_kl, "temperature": 2.5, "temperature_squared": True},
        {"kind": LossKind.reverse_kl, "temperature": 1.7},
        {"kind": LossKind.jsd, "temperature": 0.8, "jsd_beta": 0.3, "temperature_squared": True},
        {"kind": LossKind.mse},
        {"kind": LossKind.cosine},
        {"kind": LossKind.top_k_kl, "top_k": 13, "temperature": 1.3},
        {"function": huber},
    ]
    mixed = [fields | {"kd_weight": 1.3, "ce_weight": 0.7} for fields in base]
    return [LossSpec(**fields) for fields in base + mixed] + [LossSpec(kd_weight=0, ce_weight=1)]


def spec_name(spec: LossSpec) -> str:
    """For pytest's ids."""
    kind = spec.function.__name__ if spec.function else spec.kind.value  # type: ignore[attr-defined]
    return f"{kind}-T{spec.temperature}-kd{spec.kd_weight}-ce{spec.ce_weight}"
