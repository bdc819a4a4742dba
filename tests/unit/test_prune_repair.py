"""Repair: the ridge that is chosen on tokens that no linear is fitted to, and the dtype of the products."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minitron_train.config import Precision, PruneConfig, Refit
from minitron_train.pruning.least_squares import RIDGE_FACTORS, HeldOutRidge, LeastSquares
from minitron_train.pruning.target import num_held_out
from tests.support.pruning import configuration, random_tokens, run_cut

RIDGE = 0.03
Case = tuple[Tensor, Tensor, Tensor, Tensor]  # x, y, weight, whether fitted


def tokens(noise: float, seed: int = 1) -> Case:
    """300 fitted and 300 held-out tokens of one linear with 40 inputs and 5 outputs; its start is at zero."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(600, 40, generator=generator), torch.rand(600, generator=generator) + 0.5
    y = x @ torch.randn(40, 5, generator=generator) * 0.1 + noise * torch.randn(600, 5, generator=generator)
    return x, y, weight, torch.arange(600) < 300


def error(fitted: Tensor, case: Case) -> float:
    """Mean squared error on the held-out tokens."""
    x, y, weight, is_fitted = case
    return float((weight[:, None] * (y - x @ fitted.t()).square())[~is_fitted].sum())


def fit(case: Case, groups, ridge: float = RIDGE, *, has_held_out: bool = True) -> Tensor:
    squares = HeldOutRidge(40, 5, groups, has_held_out=has_held_out)
    for part in zip(*(tensor.split(150) for tensor in case), strict=True):
        squares.add(*part)
    return squares.solve(torch.zeros(5, 40), ridge)


@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
def test_the_best_ridge_on_held_out_tokens_is_taken(groups, noise: float) -> None:
    case = tokens(noise)
    x, y, weight, is_fitted = case
    tried = {}
    for factor in RIDGE_FACTORS:
        squares = LeastSquares(40, 5, groups)
        squares.add(x[is_fitted], y[is_fitted], weight[is_fitted])
        tried[factor] = squares.solve(torch.zeros(5, 40), RIDGE * factor)
    best = min(tried, key=lambda factor: error(tried[factor], case))
    assert torch.allclose(fit(case, groups), tried[best], atol=1e-6)
    assert (best < 1) if noise < 0.1 else (best > 1)


def test_without_held_out_tokens_all_are_fitted_with_the_set_ridge(groups) -> None:
    case = tokens(1.0)
    squares = LeastSquares(40, 5, groups)
    squares.add(*case[:3])
    assert torch.allclose(fit(case, groups, has_held_out=False), squares.solve(torch.zeros(5, 40), RIDGE), atol=1e-6)


@pytest.mark.parametrize(("fraction", "num", "held_out"), [(0.0, 64, 0), (0.125, 64, 8), (0.125, 7, 0), (0.5, 5, 2)])
def test_number_of_held_out_sequences(fraction: float, num: int, held_out: int) -> None:
    assert num_held_out(PruneConfig(held_out_fraction=fraction), num) == held_out


def repaired(change: Callable[[Tensor], object], fraction: float, teacher: Path, folder: Path, groups) -> Tensor:
    """The first linear that a repair changes, of one whose tokens were changed."""
    chosen = random_tokens(batches=4)
    change(chosen)
    config = configuration(refit=Refit.all, held_out_fraction=fraction, ridge=RIDGE)
    run_cut(folder, teacher, config, chosen, groups, ffn_hidden_size=56)
    return load_file(folder / "pruned" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]


def test_held_out_sequences_choose_a_ridge_alone(tiny_models, groups, tmp_path, monkeypatch) -> None:
    """With a single ridge to choose from, other held-out tokens change nothing; other fitted tokens do."""
    monkeypatch.setattr("minitron_train.pruning.least_squares.RIDGE_FACTORS", (1.0,))
    monkeypatch.setattr("minitron_train.pruning.scoring.gather_evidence", gather_once())
    results = [
        repaired(change, 0.25, tiny_models["nemotron"], tmp_path / name, groups)
        for name, change in {
            "same": lambda tokens: None,
            "held out": lambda tokens: tokens[3].fill_(5),
            "fitted": lambda tokens: tokens[0].fill_(5),
        }.items()
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-4)


def gather_once() -> Callable[..., object]:
    """Scoring that returns the first call's statistics, so that changed tokens keep the same neurons."""
    from minitron_train.pruning.scoring import gather_evidence

    found: list[object] = []

    def gather(*args: object, **kwargs: object) -> object:
        found.append(gather_evidence(*args, **kwargs))  # type: ignore[arg-type]
        return found[0]

    return gather


def test_a_repair_in_bf16_is_near_one_in_fp32(tiny_models, groups, tmp_path, monkeypatch) -> None:
    """The products are in calibration.precision. The student's weights are not rounded to bf16."""
    monkeypatch.setattr("minitron_train.pruning.scoring.gather_evidence", gather_once())
    found = {}
    for precision in (Precision.fp32, Precision.bf16):
        config = configuration(refit=Refit.all, norm_scale=True, held_out_fraction=0.0)
        config.calibration.precision = precision
        folder = run_cut(
            tmp_path / precision,
            tiny_models["nemotron"],
            config,
            random_tokens(4),
            groups,
            ffn_hidden_size=56,
            hidden_size=48,
        )
        found[precision] = load_file(folder / "model.safetensors")
    weight = found[Precision.bf16]["model.layers.0.mlp.down_proj.weight"]
    exact = found[Precision.fp32]["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    assert 0 < (weight - exact).norm() < 0.1 * exact.norm()
