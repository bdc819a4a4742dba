"""The forward KL from samples: equal to the plain formula, unbiased, and split over vocabulary shards."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_train.distillation.loss import LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.distillation.samples import Samples
from minitron_train.distillation.sampling import Draws, draw
from minitron_train.model.vocabulary import LogitMap
from tests.support.helpers import run_ranks
from tests.support.loss_reference import Case, make_case, reference, relative_error

SMALL = Chunking(logit_memory_fraction=0, vocab_tile=33, token_chunk=7)


def uniforms(num_tokens: int, num_draws: int, seed: int = 0) -> Tensor:
    return torch.rand(num_tokens, num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_samples(draws: Draws, dtype: torch.dtype = torch.float64) -> Samples:
    """Each draw as an entry of its own; repeated ids add up."""
    weights_NK = (draws.ratios_NK / draws.ids_NK.shape[1]).to(dtype)
    return Samples(ids_NK=draws.ids_NK, weights_NK=weights_NK, entropy=float(draws.entropy_N.sum()))


def sampled(case: Case, samples: Samples, spec: LossSpec, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by the function under test."""
    leaves = case.leaves()
    parts = distillation_loss(
        *(case.student_NH, case.student_VH, None, None),
        **{"labels_N": case.labels_N, "loss": spec, "samples": samples, **options},
    )
    hidden_grad, weight_grad = torch.autograd.grad(parts.total, leaves)
    return parts.total.detach(), hidden_grad, weight_grad


def dense(case: Case, samples: Samples, spec: LossSpec, map: LogitMap, mask_N: Tensor) -> tuple[Tensor, ...]:
    """The same from a whole tensor of log probabilities."""
    leaves = case.leaves()
    log_p_NV = torch.log_softmax(map.apply(case.student_NH @ case.student_VH.T) / spec.temperature, dim=1)
    cross_N = -(samples.weights_NK * log_p_NV.gather(1, samples.ids_NK)).sum(1)
    total = spec.kd_weight * ((cross_N * mask_N).sum() - samples.entropy)
    if spec.ce_weight:
        labels_NV = torch.log_softmax(map.apply(case.student_NH @ case.student_VH.T), dim=1)
        total = total - spec.ce_weight * (labels_NV.gather(1, case.labels_N[:, None])[:, 0] * mask_N).sum()
    return (total.detach(), *torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("chunking", [Chunking(), SMALL])
@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(temperature=1.7, kd_weight=0.6, ce_weight=0.3)])
def test_equals_the_plain_formula(chunking: Chunking, spec: LossSpec) -> None:
    """With weights that are not normalised, a mask, and a family that caps its logits."""
    case, map = make_case(30, 301, 16, 24), LogitMap(divisor=1.3, softcap=4.0)
    mask_N = (torch.arange(30) % 4 != 1).double()
    logits_NV = case.teacher_ND @ case.teacher_VD.T
    samples = as_samples(draw(logits_NV, uniforms(30, 9), temperature=spec.temperature, exponent=0.8))
    found = sampled(case, samples, spec, chunking=chunking, maps=(map, LogitMap()), mask_N=mask_N)
    for one, other in zip(found, dense(case, samples, spec, map, mask_N), strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("exponent", [1.0, 0.7, 1.2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_are_unbiased(exponent: float, temperature: float) -> None:
    """The mean over independent draws equals the exact KL and its gradient within four standard errors."""
    repeats, num_tokens = 400, 5
    case, spec = make_case(num_tokens, 40, 8, 8), LossSpec(temperature=temperature)
    logits_NV = case.teacher_ND @ case.teacher_VD.T
    found: list[tuple[Tensor, ...]] = []
    for seed in range(repeats):
        draws = draw(logits_NV, uniforms(num_tokens, 6, seed), temperature=temperature, exponent=exponent)
        found.append(sampled(case, as_samples(draws), spec))
    for values, exact in zip(zip(*found, strict=True), reference(case, spec), strict=True):
        stacked = torch.stack(values)
        error = stacked.std(0).norm() / repeats**0.5
        assert error < 0.2 * exact.norm()  # the test can tell a bias
        assert (stacked.mean(0) - exact).norm() < 2 * error, (exponent, temperature)


def test_entropies_are_exact_and_tokens_without_probability_are_never_drawn() -> None:
    logits_NV = torch.full((1, 50), -1000.0)
    logits_NV[0, [7, 30]] = torch.tensor([0.0, -1.0])
    draws = draw(logits_NV, torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64), temperature=1, exponent=1)
    assert draws.ids_NK.tolist() == [[7, 7, 30]]
    expected = torch.distributions.Categorical(logits=torch.tensor([0.0, -1.0], dtype=torch.float64)).entropy()
    assert float(draws.entropy_N[0]) == pytest.approx(float(expected), rel=1e-12)


def test_small_probabilities_at_the_end_of_a_large_vocabulary() -> None:
    """Tokens of 1e-9 behind one of almost 1: a sum in fp32 would give them nothing."""
    num_small = 200_000
    logits_NV = torch.full((1, num_small + 1), float(torch.tensor(1e-9).log()))
    logits_NV[0, 0] = 0.0
    share = num_small * 1e-9 / (1 + num_small * 1e-9)
    places = 1 - share * torch.linspace(0.99, 0.01, 5, dtype=torch.float64)[None]
    ids = draw(logits_NV, places, temperature=1, exponent=1).ids_NK[0] / num_small
    assert torch.allclose(ids.double(), torch.linspace(0.01, 0.99, 5, dtype=torch.float64), atol=1e-3)


def split(rank: int, world_size: int) -> list[str]:
    """Draws and losses of a vocabulary in shards, compared with those of one rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group, failures = dist.group.WORLD, []
    case, spec = make_case(24, 96, 16, 24), LossSpec(temperature=1.3, ce_weight=0.2)
    logits_NV = case.teacher_ND @ case.teacher_VD.T
    shard = slice(rank * 96 // world_size, (rank + 1) * 96 // world_size)
    for exponent in (1.0, 0.8):
        options: dict[str, Any] = {"temperature": 1.3, "exponent": exponent}
        whole = draw(logits_NV, uniforms(24, 11), **options)
        parts = draw(logits_NV[:, shard], uniforms(24, 11), **options, start=shard.start, group=group)
        if not torch.equal(whole.ids_NK, parts.ids_NK):
            failures.append(f"ids, {exponent}")
        if not torch.allclose(whole.ratios_NK, parts.ratios_NK, rtol=1e-12):
            failures.append(f"ratios, {exponent}")
        if not torch.allclose(whole.entropy_N, parts.entropy_N, rtol=1e-12):
            failures.append(f"entropies, {exponent}")
        expected = sampled(case, as_samples(whole), spec)
        own = Case(case.student_NH, case.student_VH[shard], case.teacher_ND, case.teacher_VD[shard], case.labels_N)
        found = sampled(own, as_samples(parts), spec, group=group, chunking=SMALL)
        pairs = zip(found, (*expected[:2], expected[2][shard]), strict=True)
        failures += [f"loss, {exponent}" for one, other in pairs if not torch.allclose(one, other, rtol=1e-10)]
    dist.destroy_process_group()
    return failures


@pytest.mark.parametrize("world_size", [2, 3])
def test_vocabulary_shards(world_size: int) -> None:
    assert run_ranks(split, world_size) == [[]] * world_size
