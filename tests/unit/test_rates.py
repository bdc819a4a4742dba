"""planning/rates.py: the learning rate and warm-up where the user gives none, and what a training records of them."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_train.arch import Shape
from minitron_train.commands.training import settle_rates
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, TrainConfig
from minitron_train.planning.rates import LR, MOST_WARMUP_STEPS, PARAMETERS, TOKENS, WARMUP, with_rates
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.train.optim import learning_rate
from minitron_train.train.settings import check_settings

SMOLLM2_CUT = Shape(
    architecture="llama",
    num_layers=30,
    hidden_size=504,
    ffn_hidden_size=1024,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    tie_embeddings=True,
)
INSIDE = TrainConfig(num_tokens=100_000, global_batch_size=4, micro_batch_size=4, seq_length=256)


def test_a_measured_run_gets_the_measured_rates() -> None:
    train, line = with_rates(INSIDE, 90_000_000)
    assert (train.lr, train.min_lr, train.warmup_steps) == (
        LR,
        pytest.approx(LR / 10),
        round(WARMUP * INSIDE.num_steps),
    )
    assert f"warm-up {train.warmup_steps} of {INSIDE.num_steps} steps: the best that was measured for students" in line
    assert "of 40 M to 200 M parameters;" in line


def test_a_longer_run_keeps_the_rate_and_says_what_was_measured() -> None:
    train, line = with_rates(replace(INSIDE, num_tokens=10 * TOKENS), 90_000_000)
    assert (train.lr, train.warmup_steps) == (LR, MOST_WARMUP_STEPS)
    assert "200 M parameters, in runs of up to 300 k tokens;" in line


@pytest.mark.parametrize("parameters", [PARAMETERS[0] - 1, PARAMETERS[1] + 1])
def test_other_students_get_the_papers_rate(parameters: int) -> None:
    train, line = with_rates(INSIDE, parameters)
    assert (train.lr, train.min_lr, train.warmup_steps) == (1e-4, 1e-5, 10)
    assert "learning rate 1e-4" in line and "that of the papers' larger students" in line


def test_given_values_stay() -> None:
    """Without a rate, a given warm-up and final rate still hold; with a rate, the warm-up is the usual one."""
    train, line = with_rates(replace(INSIDE, warmup_steps=3, min_lr=0.0), 90_000_000)
    assert (train.lr, train.min_lr, train.warmup_steps) == (LR, 0.0, 3) and line
    train, line = with_rates(replace(INSIDE, lr=3e-3), 90_000_000)
    assert (train.lr, train.min_lr, train.warmup_steps, line) == (3e-3, pytest.approx(3e-4), 10, "")


def test_a_short_run_has_no_warm_up_beyond_its_end() -> None:
    short = replace(INSIDE, num_tokens=3 * INSIDE.step_tokens)
    assert short.rates[2] == 3
    check_settings(Config(train=short), distilled=True)
    assert learning_rate(short, 2 * short.step_tokens) == pytest.approx(1e-4)
    with pytest.raises(UserError, match=r"train\.warmup_steps=4: longer than the run of 3 steps"):
        check_settings(Config(train=replace(short, warmup_steps=4)), distilled=True)


def test_a_final_rate_needs_no_peak() -> None:
    replace(INSIDE, min_lr=1e-6).validate()
    for wrong in ({"lr": 0.0}, {"lr": 1e-4, "min_lr": 1e-3}, {"min_lr": -1e-5}):
        with pytest.raises(UserError, match=r"train\.(min_)?lr"):
            replace(INSIDE, **wrong).validate()


def test_a_training_begins_with_the_rates_that_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as stack:
        ws = Workspace(Config(), [], World(), stack)
        monkeypatch.setattr(ws, "shape_of", lambda folder: SMOLLM2_CUT)
        found = settle_rates(ws, Config(train=INSIDE), tmp_path)
        assert (found.train.lr, found.train.warmup_steps) == (LR, round(WARMUP * INSIDE.num_steps))
        assert "distill: learning rate 4e-4, at the end 4e-5" in capsys.readouterr().out
        settle_rates(ws, Config(train=replace(INSIDE, lr=2e-3)), tmp_path)
        assert not capsys.readouterr().out
