"""Section distill: the loss."""

from dataclasses import dataclass
from enum import Enum

from minitron_train.config.base import Precision, opt, require, require_positive


class LossKind(Enum):
    """Distillation losses on logits (arXiv 2407.14679 table 15)."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    mse = "mse"
    cosine = "cosine"
    top_k_kl = "top_k_kl"


class HiddenLossKind(Enum):
    """How two hidden states are compared; cosine is the better one (arXiv 2407.14679 appendix A.4)."""

    cosine = "cosine"
    mse = "mse"


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """The loss (arXiv 2407.14679 §3)."""

    loss: LossKind = opt(LossKind.forward_kl, "on the logits of the full vocabulary")
    temperature: float = opt(1.0, "both models' logits are divided by it")
    temperature_squared: bool = opt(False, "multiply the loss by temperature²")
    top_k: int = opt(0, "top_k_kl: number of the teacher's largest logits")
    teacher_precision: Precision | None = opt(None, "of the teacher's weights; default: train.precision")
    kd_weight: float = opt(1.0, "of the distillation loss")
    ce_weight: float = opt(0.0, "of the cross-entropy on the labels")
    jsd_beta: float = opt(0.5, "jsd: the teacher's share of the mixture")
    memory_budget_u: float | None = opt(None, "memory of the loss, in fp32 logit tensors; default: 0.2, or 256 MiB")
    vocab_tile: int | None = opt(None, "vocabulary rows of a block of the loss; default: from the memory budget")
    token_chunk: int | None = opt(None, "tokens of a block of the loss; default: from the memory budget")
    hidden_layers: list[str] = opt(list, "layers compared, STUDENT/TEACHER, from 0: [embedding/embedding, 13/29]")
    hidden_loss: HiddenLossKind = opt(HiddenLossKind.cosine, "between those outputs, the student's projected up")
    hidden_weight: float | None = opt(None, "of that loss; default: dynamic, the logit loss over it in the step before")

    def validate(self) -> None:
        """Ranges."""
        require_positive(self, "distill", "temperature")
        for pair in self.hidden_layers:
            names = pair.split("/")
            fits = len(names) == 2 and all(name == "embedding" or name.isdecimal() for name in names)
            rule = "must be STUDENT/TEACHER, each a layer's number or embedding"
            require(fits, "distill.hidden_layers", pair, rule, "give pairs like 13/29")
        fits = (self.top_k > 0) == (self.loss is LossKind.top_k_kl)
        require(fits, "distill.top_k", self.top_k, "goes with distill.loss=top_k_kl", "set both or neither")
        require(0 < self.jsd_beta < 1, "distill.jsd_beta", self.jsd_beta, "must lie between 0 and 1", "0.5 is usual")
        for name in ("kd_weight", "ce_weight"):
            value = getattr(self, name)
            require(value >= 0, f"distill.{name}", value, "must not be negative", "0 leaves the loss out")
        weighted = self.kd_weight + self.ce_weight > 0
        require(weighted, "distill.kd_weight", self.kd_weight, "0 together with distill.ce_weight", "raise one of them")
