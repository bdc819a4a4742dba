"""One forward pass of teacher and student over a micro-batch, and the loss."""

# B sequences, S tokens of a sequence, N = S * B tokens, H hidden size (student's or teacher's)
from dataclasses import dataclass, fields
from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from minitron_train.config import DistillConfig
from minitron_train.data.stream import Batch
from minitron_train.distillation.cached_teacher import CachedTeacher
from minitron_train.distillation.hidden import HiddenPairs
from minitron_train.distillation.loss import LossParts, LossSpec, distillation_loss
from minitron_train.distillation.loss_memory import LossMemory
from minitron_train.distillation.samples import Samples
from minitron_train.model.build import LanguageModel
from minitron_train.model.vocabulary import PLAIN, OutputLayer
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.plugins import import_name


def loss_spec(distill: DistillConfig, has_teacher: bool) -> LossSpec:
    """The configured loss; cross-entropy alone without a teacher (`pretrain`)."""
    if not has_teacher:
        return LossSpec(kd_weight=0.0, ce_weight=1.0)
    function = import_name("distill.loss_function", distill.loss_function) if distill.loss_function else None
    others = [field.name for field in fields(LossSpec) if field.name not in ("kind", "function")]
    return LossSpec(kind=distill.loss, function=function, **{name: getattr(distill, name) for name in others})


def attention_mask(documents_BS: Tensor | None) -> Tensor | None:
    """Mask [B, 1, S, S] that hides (True) later tokens and other documents; None for causal attention over whole rows."""
    if documents_BS is None:
        return None
    length = documents_BS.shape[1]
    future_SS = torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).triu(1)
    other_BSS = documents_BS[:, :, None] != documents_BS[:, None, :]
    return (other_BSS | future_SS)[:, None]


LossSums = dict[str, Tensor]  # loss part -> its fp64 sum over tokens; the keys are the names in metrics.jsonl


def add(one: LossSums, other: LossSums) -> LossSums:
    """Add two dicts of sums, part by part; `one` may be empty."""
    return {name: one[name] + value if name in one else value for name, value in other.items()}


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Losses of one micro batch, summed over its valid tokens."""

    total: Tensor  # with gradients
    sums: LossSums  # detached: `loss` (the total) and its parts, unweighted


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The training objective. The teacher is frozen and may have another dtype; without one, labels alone are used.

    A `cached` teacher replaces the model `teacher`, which is then None.
    """

    student: DistributedDataParallel  # around the LanguageModel
    teacher: LanguageModel | None
    spec: LossSpec
    memory: LossMemory
    groups: Groups
    hidden: HiddenPairs | None = None
    vocab_size: int | None = None  # output rows without padding; set where the models are padded differently
    cached: CachedTeacher | None = None

    def __call__(self, batch: Batch, hidden_weight: float = 0.0) -> StepLosses:
        """The configured loss of a batch: on logits, plus `hidden_weight` x the loss on hidden states if configured."""
        return self.losses(batch, *self.forward(batch, self.spec), hidden_weight)

    def losses(
        self, batch: Batch, student_SBH: Tensor, teacher_SBH: Tensor | None, hidden_weight: float = 0.0
    ) -> StepLosses:
        """The same, from what `forward` returned."""
        logits = self.loss_parts(batch, self.spec, student_SBH, teacher_SBH)
        total, parts = logits.total, {"kd_loss": logits.kd_sum, "ce_loss": logits.ce_sum}
        if self.hidden is not None:
            parts["hidden_loss"] = self.hidden.loss(batch.mask_BS.T.flatten(), self._gather)
            total = total + hidden_weight * parts["hidden_loss"]
        return StepLosses(total, {name: value.detach().double() for name, value in ({"loss": total} | parts).items()})

    def hidden_losses(self, batch: Batch, hidden_weight: float) -> StepLosses:
        """The losses of a pipeline stage before the last one: those of its pairs of layers."""
        assert self.hidden is not None
        hidden = self.hidden.loss(batch.mask_BS.T.flatten(), self._gather)
        total = hidden_weight * hidden
        return StepLosses(total, {"loss": total.detach().double(), "hidden_loss": hidden.detach().double()})

    @property
    def unused(self) -> list[str]:
        """Loss parts that the configured loss does not compute."""
        weights = {"kd_loss": self.spec.kd_weight, "ce_loss": self.spec.ce_weight}
        return [name for name, weight in weights.items() if not weight]

    def over_stages(self, sums: LossSums) -> LossSums:
        """Sum each loss part over the pipeline stages, of which a stage may lack some or all; collective."""
        names = ["loss", "kd_loss", "ce_loss", *(["hidden_loss"] if self.hidden is not None else [])]
        none = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        values = torch.stack([sums.get(name, none) for name in names])
        return dict(zip(names, self.groups.sum_over_stages(values).unbind(), strict=True))

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is in memory or in a cache."""
        return self.teacher is not None or self.cached is not None

    @property
    def model(self) -> LanguageModel:
        """The student without its DDP wrapper."""
        return cast(LanguageModel, self.student.module)

    @property
    def num_rows(self) -> int:
        """Vocabulary rows of this rank."""
        return self.model.vocab_size // self.groups.tp_size

    def teacher_of(self, spec: LossSpec) -> LanguageModel | None:
        """The teacher if the loss uses it."""
        return self.teacher if spec.kd_weight or self.hidden is not None else None

    def forward(self, batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor | None]:
        """Hidden states [S / tp, B, H] of the student and of the teacher; None if the loss does not use the teacher.

        They are those of the last layer that this pipeline stage holds.
        """
        mask = attention_mask(batch.documents_BS)
        teacher, teacher_SBH = self.teacher_of(spec), None
        if teacher is not None:
            with torch.no_grad():
                teacher_SBH = teacher(batch.tokens_BS, mask)
        return self.student(batch.tokens_BS, mask), teacher_SBH

    def logit_loss(self, batch: Batch, spec: LossSpec) -> LossParts:
        """The loss `spec` on the logits of both models; the teacher runs only if the loss uses it."""
        return self.loss_parts(batch, spec, *self.forward(batch, spec))

    def loss_parts(self, batch: Batch, spec: LossSpec, student_SBH: Tensor, teacher_SBH: Tensor | None) -> LossParts:
        """The same, from what `forward` returned on the last stage."""
        teacher_NH, output, samples = self.predictions(batch, spec, teacher_SBH)
        return distillation_loss(
            self._gather(student_SBH),
            self.model.output_weight,
            teacher_NH,
            None if output is None else output.weight_VH,
            loss=spec,
            samples=samples,
            maps=(self.model.logit_map, PLAIN if output is None else output.map),
            mask_N=batch.mask_BS.T.flatten(),
            labels_N=batch.labels_BS.T.flatten(),
            vocab_size=self.vocab_size,
            group=self.groups.tp_group if self.groups.tp_size > 1 else None,
            chunking=self.memory.chunking(batch.tokens_BS.numel(), self.num_rows),
        )

    def predictions(
        self, batch: Batch, spec: LossSpec, teacher_SBH: Tensor | None
    ) -> tuple[Tensor | None, OutputLayer | None, Samples | None]:
        """The teacher's final hidden states [N, H] with its output layer, or samples; all None if the loss does not use them."""
        if self.teacher is not None and teacher_SBH is not None:
            return self._gather(teacher_SBH), self.teacher.output, None
        if self.cached is None or not spec.kd_weight:
            return None, None, None
        if self.cached.output is None:
            return None, None, self.cached.samples(batch)
        return self.cached.hidden_states(batch), self.cached.output, None

    def _gather(self, hidden_SBH: Tensor) -> Tensor:
        """Hidden states [N, H], complete on every tensor-parallel rank."""
        if self.model.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
        return hidden_SBH.flatten(0, 1)
