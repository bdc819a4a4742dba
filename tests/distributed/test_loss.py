"""The loss split over tensor-parallel ranks: every kind equals one rank, which equals full logits in float64."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from minitron_train.config import LossKind
from minitron_train.distillation.loss import LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.runtime.errors import UserError
from tests.support.helpers import run_ranks
from tests.support.loss_reference import Case, make_case, reference, relative_error, specs

VOCAB, VOCAB_REAL = 96, 41  # of 4 shards the second has some padding, the last two are nothing else
TOP_K = 30  # more than a shard of 4 ranks has


def shard(case: Case, rank: int, world_size: int) -> Case:
    """This rank's rows of both output layers."""
    rows = slice(rank * VOCAB // world_size, (rank + 1) * VOCAB // world_size)
    return Case(case.student_NH, case.student_VH[rows], case.teacher_ND, case.teacher_VD[rows], case.labels_N)


def split_losses(rank: int, world_size: int) -> list[str]:
    """Compare every kind with the reference on the whole; what differs, by name."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    wide = LossSpec(kind=LossKind.top_k_kl, top_k=TOP_K, ce_weight=0.2)
    alone = [spec for spec in specs() if not spec.ce_weight]
    mixed = [spec for spec in specs() if spec.ce_weight]
    failures = []
    whole = (alone, None, Chunking())
    padded = ([*mixed, wide], VOCAB_REAL, Chunking(logit_memory_fraction=0, vocab_tile=7, token_chunk=5))
    for kinds, vocab_size, chunking in [whole, padded] if world_size == 2 else [padded]:
        for spec in kinds:
            case = make_case(12, VOCAB, 16, 24)
            case.labels_N.clamp_(max=VOCAB_REAL - 1)
            total, hidden_grad, weight_grad = reference(case, spec, vocab_size)
            part = shard(case.to(torch.float64), rank, world_size)
            leaves = part.leaves()
            parts = distillation_loss(
                *(part.student_NH, part.student_VH, part.teacher_ND, part.teacher_VD),
                **{"labels_N": part.labels_N, "loss": spec, "vocab_size": vocab_size, "group": group},
                chunking=chunking,
            )
            found = (parts.total, *torch.autograd.grad(parts.total, leaves))
            expected = (total, hidden_grad, weight_grad.chunk(world_size)[rank])
            for name, one, other in zip(("loss", "hidden", "weight"), found, expected, strict=True):
                if not torch.allclose(one, other, rtol=1e-10, atol=1e-13):
                    failures.append(f"{name} of {spec}, vocab_size={vocab_size}")
    failures += float32_errors(rank, world_size) + refusals(rank, world_size)
    dist.destroy_process_group()
    return failures


def float32_errors(rank: int, world_size: int) -> list[str]:
    """At logits of standard deviation 3 the split gradients are as exact as the plain fp32 path of one rank."""
    case = make_case(64, VOCAB * 40, 64, 64)
    exact, single = reference(case, LossSpec()), case.to(torch.float32)
    plain = reference(single, LossSpec())
    rows = len(case.student_VH) // world_size
    part = Case(
        single.student_NH.detach(),
        single.student_VH.detach()[rank * rows : (rank + 1) * rows],
        single.teacher_ND,
        single.teacher_VD[rank * rows : (rank + 1) * rows],
        single.labels_N,
    )
    total = distillation_loss(
        *(part.student_NH.requires_grad_(), part.student_VH.requires_grad_(), part.teacher_ND, part.teacher_VD),
        loss=LossSpec(),
        group=dist.group.WORLD,
    ).total
    hidden_grad, weight_grad = torch.autograd.grad(total, (part.student_NH, part.student_VH))
    limits = [min(1e-5, 1.2 * relative_error(one, other)) for one, other in zip(plain[1:], exact[1:], strict=True)]
    errors = relative_error(hidden_grad, exact[1]), relative_error(weight_grad, exact[2].chunk(world_size)[rank])
    return [f"{error} > {limit}" for error, limit in zip(errors, limits, strict=True) if error > limit]


def refusals(rank: int, world_size: int) -> list[str]:
    """Shards that do not meet are refused on every rank, before any collective."""
    case = shard(make_case(12, VOCAB, 16, 24), rank, world_size)
    with pytest.raises(UserError, match=f"student {VOCAB}, teacher {VOCAB - world_size}.*pad both"):
        distillation_loss(
            *(case.student_NH, case.student_VH, case.teacher_ND, case.teacher_VD[:-1]),
            **{"loss": LossSpec(), "vocab_size": VOCAB_REAL, "group": dist.group.WORLD},
        )
    return []


@pytest.mark.parametrize("world_size", [2, 4])
def test_split_equals_whole(world_size: int) -> None:
    for rank, failures in enumerate(run_ranks(split_losses, world_size)):
        assert not failures, f"rank {rank}: {failures[:5]} and {len(failures)} in all"
