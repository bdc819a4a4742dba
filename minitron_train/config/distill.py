"""Section distill: the loss."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from minitron_train.config.base import Precision, opt, require


class LossKind(StrEnum):
    """Distillation losses on logits (arXiv 2407.14679 table 15)."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    mse = "mse"
    cosine = "cosine"
    top_k_kl = "top_k_kl"


class HiddenLossKind(StrEnum):
    """How two hidden states are compared; cosine is the better one (arXiv 2407.14679 appendix A.4)."""

    cosine = "cosine"
    mse = "mse"


def check_loss(values: Any, kind: LossKind, prefix: str = "") -> None:
    """The rules of a loss on logits: for this section, and for distillation.loss.LossSpec."""
    takes_temperature, takes_top_k = kind not in (LossKind.mse, LossKind.cosine), kind is LossKind.top_k_kl
    weighted = values.kd_weight + values.ce_weight > 0
    rules = (  # name, whether it holds, rule, remedy
        ("temperature", values.temperature > 0, "must be greater than 0", "1 is usual"),
        (
            "temperature",
            values.temperature == 1 or takes_temperature,
            f"must be 1 with {prefix}loss={kind.value}",
            "leave it out",
        ),
        (
            "top_k",
            (values.top_k > 0) == takes_top_k,
            f"is for {prefix}loss=top_k_kl only, which needs it",
            "set both or neither",
        ),
        ("jsd_beta", 0 < values.jsd_beta < 1, "must lie between 0 and 1", "0.5 is usual"),
        ("kd_weight", values.kd_weight >= 0, "must not be negative", "0 leaves the loss out"),
        ("ce_weight", values.ce_weight >= 0, "must not be negative", "0 leaves the loss out"),
        ("kd_weight", weighted, f"must not be 0 together with {prefix}ce_weight", "raise one of them"),
    )
    for name, holds, rule, remedy in rules:
        require(holds, prefix + name, getattr(values, name), rule, remedy)


def check_blocks(values: Any, prefix: str = "") -> None:
    """The rules of how a loss is cut into blocks: for this section, and for distillation.loss_blocks.Chunking."""
    budget = values.logit_memory_fraction
    require(
        budget is None or budget >= 0,
        f"{prefix}logit_memory_fraction",
        budget,
        "must not be negative",
        "0 uses the smallest blocks",
    )
    for name in ("vocab_tile", "token_chunk"):
        value = getattr(values, name)
        require(value is None or value >= 1, prefix + name, value, "must be at least 1", "leave it out")


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """The loss (arXiv 2407.14679 §3)."""

    loss: LossKind = opt(LossKind.forward_kl, "distillation loss on the logits of the full vocabulary")
    loss_function: str | None = opt(
        None,
        "your own loss in place of distill.loss: my_lab.losses.name(student_logits, teacher_logits) -> loss per token",
    )
    temperature: float = opt(1.0, "divisor of the logits of both models")
    temperature_squared: bool = opt(False, "multiply the loss by temperature²")
    top_k: int = opt(0, "loss=top_k_kl: number of largest teacher logits that are compared")
    teacher_precision: Precision | None = opt(None, "dtype of the teacher's weights; default: train.precision")
    teacher_fp8: bool = opt(
        False,
        "multiply the teacher's matrices in FP8; needs train.transformer_engine=true and a GPU that has FP8 (H100, for example); "
        "not tested",
    )
    kd_weight: float = opt(1.0, "weight of the distillation loss")
    ce_weight: float = opt(0.0, "weight of the cross-entropy on the labels")
    jsd_beta: float = opt(0.5, "loss=jsd: weight of the teacher in the mixture")
    logit_memory_fraction: float | None = opt(
        None,
        "memory of the loss, as a fraction of one fp32 [tokens, vocabulary] tensor; default: 0.2, at least 256 MiB; "
        "on a GPU plus half of what step 2 leaves free",
    )
    vocab_tile: int | None = opt(None, "vocabulary entries per block of the loss; default: from logit_memory_fraction")
    token_chunk: int | None = opt(None, "tokens per block of the loss; default: from logit_memory_fraction")
    compile_loss: bool | None = opt(
        None, "loss=forward_kl: fuse its passes over the logits with torch.compile; default: on GPUs only"
    )
    hidden_layers: list[str] = opt(
        list,
        "pairs STUDENT/TEACHER of layers to compare, counted from 0: [embedding/embedding, 13/29]",
    )
    hidden_loss: HiddenLossKind = opt(
        HiddenLossKind.cosine, "loss between the outputs of hidden_layers; a projection widens the student's"
    )
    hidden_weight: float | None = opt(
        None, "weight of hidden_loss; default: logit loss / hidden loss of the previous step"
    )

    def validate(self) -> None:
        check_loss(self, self.loss, "distill.")
        plain = (self.loss, self.temperature, self.temperature_squared) == (LossKind.forward_kl, 1.0, False)
        rule = "replaces distill.loss, distill.temperature and distill.temperature_squared"
        require(plain or not self.loss_function, "distill.loss_function", self.loss_function, rule, "leave them out")
        check_blocks(self, "distill.")
        for pair in self.hidden_layers:
            names = pair.split("/")
            fits = len(names) == 2 and all(name == "embedding" or name.isdecimal() for name in names)
            rule = "must be STUDENT/TEACHER, each a layer's number or embedding"
            require(fits, "distill.hidden_layers", pair, rule, "give pairs like 13/29")
