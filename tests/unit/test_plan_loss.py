"""The plan's passes over logits and capped scores are those that the code makes: every tensor operation is counted."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_train.config import DistillConfig, LossKind, TeachKind
from minitron_train.distillation.loss import LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.distillation.samples import Samples
from minitron_train.model.attention import CAPPED_QUERIES, CappedAttention
from minitron_train.planning.timing import SOFTCAP_PASSES, logit_passes
from tests.support.passes import Traffic

NUM_TOKENS, VOCAB, WIDTH = 256, 4096, 4

LOSSES = [
    *(DistillConfig(loss=kind, top_k=8 * (kind is LossKind.top_k_kl)) for kind in LossKind),
    *(DistillConfig(loss=kind, temperature=2) for kind in (LossKind.forward_kl, LossKind.reverse_kl, LossKind.jsd)),
    DistillConfig(kd_weight=0, ce_weight=1),
    DistillConfig(ce_weight=1),
]


@pytest.mark.parametrize("distill", LOSSES, ids=lambda distill: f"{distill.loss.value}-{distill.temperature}")
def test_the_passes_over_logits_are_counted(distill: DistillConfig) -> None:
    names = ("kind", "temperature", "top_k", "kd_weight", "ce_weight")
    spec = LossSpec(**{name: getattr(distill, "loss" if name == "kind" else name) for name in names})
    student, teacher = ([torch.randn(size, WIDTH) for size in (NUM_TOKENS, VOCAB)] for _ in range(2))
    for tensor in student:
        tensor.requires_grad_()
    labels = torch.zeros(NUM_TOKENS, dtype=torch.long)
    with Traffic() as traffic:
        loss = distillation_loss(
            *student, *teacher, loss=spec, labels_N=labels, chunking=Chunking(logit_memory_fraction=100)
        )
        loss.total.backward()
    assert traffic.elements / (NUM_TOKENS * VOCAB) == pytest.approx(logit_passes(distill), abs=0.3)


def test_the_passes_over_capped_scores_are_counted() -> None:
    """Of a forward pass; with the backward pass, which computes the scores again, about three times as many."""
    length, heads, width = CAPPED_QUERIES, 4, 4
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * width, num_attention_heads=heads, attention_dropout=0.0
    )
    core = CappedAttention(config, 1, AttnMaskType.causal, softcap=50.0)
    inputs = [torch.randn(length, 2, heads, width) for _ in "qkv"]
    core(*inputs, None)  # makes the cached mask
    scores, found = 2 * heads * length**2, []
    for trains in (False, True):
        for tensor in inputs:
            tensor.requires_grad_(trains)
        with Traffic() as traffic:
            context = core(*inputs, None)
            if trains:
                context.sum().backward()
        found.append(traffic.elements / scores)
    assert found[0] == pytest.approx(SOFTCAP_PASSES, abs=0.7) and found[1] == pytest.approx(3 * SOFTCAP_PASSES, abs=2)


@pytest.mark.parametrize("labels", [0.0, 1.0])
def test_the_passes_of_samples_are_counted(labels: float) -> None:
    """Only the student's logits are read; eight ids a token cost little."""
    distill = DistillConfig(ce_weight=labels)
    hidden, weight = (torch.randn(size, WIDTH, requires_grad=True) for size in (NUM_TOKENS, VOCAB))
    samples = Samples(
        ids_NK=torch.arange(8).expand(NUM_TOKENS, 8), weights_NK=torch.full((NUM_TOKENS, 8), 1 / 8), entropy=0.0
    )
    with Traffic() as traffic:
        loss = distillation_loss(
            hidden,
            weight,
            None,
            None,
            loss=LossSpec(ce_weight=labels),
            samples=samples,
            labels_N=torch.zeros(NUM_TOKENS, dtype=torch.long),
            chunking=Chunking(logit_memory_fraction=100),
        )
        loss.total.backward()
    passes = logit_passes(distill, TeachKind.samples)
    assert traffic.elements / (NUM_TOKENS * VOCAB) == pytest.approx(passes, abs=0.3)
