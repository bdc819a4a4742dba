"""One forward pass of teacher and student over a batch: hidden states of both, and the loss between them."""

# B sequences, S tokens of a sequence, N = S * B tokens, H hidden size (student's or teacher's)
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from minitron_train.config import DistillConfig
from minitron_train.data.stream import Batch
from minitron_train.distillation.hidden import HiddenPairs
from minitron_train.distillation.loss import LossParts, LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.model.build import LanguageModel
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.plugins import import_name

SMALL_BYTES = 256 * 2**20  # of kept logits do not hurt anybody, and save computing them twice


def loss_spec(distill: DistillConfig, has_teacher: bool) -> LossSpec:
    """The configured loss; cross-entropy alone without a teacher (`pretrain`)."""
    if not has_teacher:
        return LossSpec(kd_weight=0.0, ce_weight=1.0)
    return LossSpec(
        kind=distill.loss,
        temperature=distill.temperature,
        temperature_squared=distill.temperature_squared,
        top_k=distill.top_k,
        jsd_beta=distill.jsd_beta,
        function=import_name("distill.loss_function", distill.loss_function) if distill.loss_function else None,
        kd_weight=distill.kd_weight,
        ce_weight=distill.ce_weight,
    )


def chunking(distill: DistillConfig, num_tokens: int, num_rows: int) -> Chunking:
    """Memory of the loss: as configured, or 0.2 logit tensors, or so much that small vocabularies keep all their logits."""
    fraction = distill.logit_memory_fraction
    if fraction is None:
        fraction = max(Chunking().logit_memory_fraction, SMALL_BYTES / (num_tokens * num_rows * 4))
    return Chunking(logit_memory_fraction=fraction, vocab_tile=distill.vocab_tile, token_chunk=distill.token_chunk)


def attention_mask(documents_BS: Tensor | None) -> Tensor | None:
    """Hides (True) the future and other documents, [B, 1, S, S]; None is causal attention over the whole row."""
    if documents_BS is None:
        return None
    length = documents_BS.shape[1]
    future_SS = torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).triu(1)
    other_BSS = documents_BS[:, :, None] != documents_BS[:, None, :]
    return (other_BSS | future_SS)[:, None]


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Sums over the valid tokens of one micro batch; `total` carries the gradients, `sums` is [total, kd, ce, hidden]."""

    total: Tensor
    sums: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is minimised. `teacher` is frozen: no gradients, no optimizer state, its own dtype; None trains on labels alone."""

    student: DistributedDataParallel  # around the LanguageModel
    teacher: LanguageModel | None
    spec: LossSpec
    distill: DistillConfig  # how the loss is cut into blocks
    groups: Groups
    hidden: HiddenPairs | None = None
    vocab_size: int | None = None  # real output rows, where the models differ in padding

    def __call__(self, batch: Batch, hidden_weight: float = 0.0) -> StepLosses:
        """The configured loss of a batch: logits, and the hidden states times `hidden_weight` where layers are paired."""
        logits = self.logit_loss(batch, self.spec)
        total, hidden = logits.total, torch.zeros_like(logits.kd_sum)
        if self.hidden is not None:
            hidden = self.hidden.loss(batch.mask_BS.T.flatten(), self._gather)
            total = total + hidden_weight * hidden
        sums = torch.stack([value.detach().double() for value in (total, logits.kd_sum, logits.ce_sum, hidden)])
        return StepLosses(total, sums)

    @property
    def model(self) -> LanguageModel:
        """The student without its wrapper."""
        return cast(LanguageModel, self.student.module)

    def logit_loss(self, batch: Batch, spec: LossSpec) -> LossParts:
        """One forward pass of both models (the teacher's only where it is read) and the loss `spec` on their logits."""
        mask = attention_mask(batch.documents_BS)
        teacher_NH = teacher_VH = None
        if self.teacher is not None and (spec.kd_weight or self.hidden is not None):
            with torch.no_grad():
                teacher_NH = self._gather(self.teacher(batch.tokens_BS, mask))
                teacher_VH = self.teacher.output_weight
        return distillation_loss(
            self._gather(self.student(batch.tokens_BS, mask)),
            self.model.output_weight,
            teacher_NH,
            teacher_VH,
            loss=spec,
            mask_N=batch.mask_BS.T.flatten(),
            labels_N=batch.labels_BS.T.flatten(),
            vocab_size=self.vocab_size,
            group=self.groups.tp_group if self.groups.tp_size > 1 else None,
            chunking=chunking(self.distill, batch.tokens_BS.numel(), len(self.model.output_weight)),
        )

    def _gather(self, hidden_SBH: Tensor) -> Tensor:
        """Hidden states [N, H], whole on every tensor-parallel rank."""
        if self.model.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
        return hidden_SBH.flatten(0, 1)
