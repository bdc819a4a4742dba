"""The best checkpoint by a chosen metric, and the end of a run that no longer improves."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.config import Config
from minitron_train.runtime.errors import UserError
from minitron_train.train import checkpoint_files as files
from minitron_train.train.best import BestMetric
from minitron_train.train.hooks import Hook
from tests.support.training import ROWS, SEQ_LENGTH, Interrupted, Material, before_step, interrupt, make_config, rows

EVERY_STEP: dict[str, Any] = {
    "eval__every_tokens": ROWS * SEQ_LENGTH,
    "eval__training_tasks": ["quiz"],
    "checkpoint__keep": 9,
}
ACCURACIES = [0.1, 0.4, 0.3, 0.4, 0.2, 0.9, 0.9, 0.9]  # after each of the eight steps
BY_QUIZ = EVERY_STEP | {"checkpoint__best_metric": "quiz.acc"}
PATIENT = BY_QUIZ | {"train__early_stop_evaluations": 3}


def quiz(trainer: Any) -> dict[str, float]:
    """An evaluation whose outcome is known."""
    accuracy = ACCURACIES[trainer.state.step - 1]
    return {"eval.quiz.acc": accuracy, "eval.quiz.acc.teacher": 1.0, "eval.quiz.acc.kept": accuracy}


class Evaluation(Hook):
    """A further evaluation from a function."""

    def __init__(self, function: Callable[[Any], dict[str, float]]) -> None:
        self.function = function

    def evaluate(self, training: Any) -> dict[str, Any]:
        return self.function(training)


def run(
    material: Material, folder: Path, settings: dict[str, Any], hook: Callable[[Any], dict[str, float]] = quiz
) -> dict[str, Any]:
    """A run with an evaluation after every step."""
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import World
    from minitron_train.train.run import train

    config = make_config(material, **settings)
    with start(config.parallel, World(), config.seed) as groups:
        return train(
            config, groups, student=material.student, teacher=material.teacher, folder=folder, hooks=[Evaluation(hook)]
        )


def test_directions() -> None:
    assert BestMetric("validation.kl").rank(0.1) < BestMetric("validation.kl").rank(0.2)
    assert BestMetric("wikitext.word_perplexity").rank(10.0) < BestMetric("wikitext.word_perplexity").rank(11.0)
    assert BestMetric("hellaswag.acc_norm").rank(0.4) < BestMetric("hellaswag.acc_norm").rank(0.3)
    for nothing in (None, math.nan, math.inf, -math.inf):
        assert BestMetric("hellaswag.acc").rank(0.0) < BestMetric("hellaswag.acc").rank(nothing) == math.inf


def test_metrics_that_no_evaluation_gives(training: Material, tmp_path: Path) -> None:
    config = Config()
    assert BestMetric.of(config, distilled=True).name == "validation.kl"
    assert BestMetric.of(config, distilled=False).name == "validation.loss"
    config.eval.training_tasks, config.checkpoint.best_metric = ["hellaswag"], "mmlu.acc"
    with pytest.raises(UserError, match=r"best_metric=mmlu.acc: must be one of validation.kl, .*, hellaswag.METRIC;"):
        BestMetric.of(config, distilled=True)
    given = (
        r"best_metric=quiz.f1: the evaluation has only validation.kl, validation.loss, validation.perplexity, quiz.acc;"
    )
    with pytest.raises(UserError, match=given):
        run(training, tmp_path, EVERY_STEP | {"checkpoint__best_metric": "quiz.f1"})
    facts = run(training, tmp_path, BY_QUIZ)
    assert (facts["resumed_at_step"], facts["best"]) == (1, 0.9)
    assert [row["eval.quiz.acc"] for row in rows(tmp_path) if "loss" in row] == ACCURACIES


def out_of_memory(trainer: Any) -> dict[str, float]:
    """An evaluation that fails at the end of the run."""
    raise torch.OutOfMemoryError


def test_a_failed_evaluation_loses_no_step(training: Material, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            run(training, tmp_path, {"checkpoint__interval_steps": 99}, out_of_memory)
    facts = run(training, tmp_path, {"checkpoint__interval_steps": 99})
    assert (facts["resumed_at_step"], facts["evaluation"]["quiz.acc"]) == (8, 0.9)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))
    assert files.evaluation_of(tmp_path / "checkpoints" / "step_00000008")["quiz.acc"] == 0.9


@pytest.mark.parametrize("step", [5, 8])
def test_after_a_signal_the_evaluation_waits_for_the_next_start(training: Material, tmp_path: Path, step: int) -> None:
    asked: list[int] = []

    def hook(trainer: Any) -> dict[str, float]:
        asked.append(trainer.state.step)
        return quiz(trainer)

    with before_step(step, lambda _: os.kill(os.getpid(), signal.SIGUSR1)), pytest.raises(SystemExit):
        run(training, tmp_path, EVERY_STEP, hook)
    assert asked == list(range(1, step))
    assert run(training, tmp_path, EVERY_STEP, hook)["resumed_at_step"] == step
    assert asked == list(range(1, 9))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == asked and [row["eval.quiz.acc"] for row in found] == ACCURACIES


def test_best_checkpoint_by_a_task(training: Material, tmp_path: Path) -> None:
    facts = run(training, tmp_path, BY_QUIZ | {"checkpoint__keep": 1})
    assert (facts["best_metric"], facts["best"], facts["stopped_early"]) == ("quiz.acc", 0.9, False)
    found = tmp_path / "checkpoints"
    assert [path.name for path in files.finished(found)] == ["step_00000008", "step_00000006"]
    assert (found / "best").read_text() == "step_00000006\n"


def test_early_stop(training: Material, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    facts = run(training, tmp_path, PATIENT)
    assert facts["steps"] == 5 and facts["stopped_early"]
    assert "step 5: stopping early: no improvement over quiz.acc=0.4 in 3 evaluations" in capsys.readouterr().out
    found = tmp_path / "checkpoints"
    assert (found / "latest").read_text() == "step_00000005\n"
    assert (found / "best").read_text() == "step_00000002\n"
    assert run(training, tmp_path, PATIENT)["steps"] == 5, "started again, it is still over"
    assert run(training, tmp_path, PATIENT | {"train__early_stop_evaluations": 0})["steps"] == 8


def test_early_stop_counts_over_a_resume(training: Material, tmp_path: Path) -> None:
    settings = PATIENT | {"checkpoint__interval_steps": 1}
    with before_step(5, interrupt), pytest.raises(Interrupted):
        run(training, tmp_path, settings)
    facts = run(training, tmp_path, settings)
    assert (facts["resumed_at_step"], facts["steps"]) == (4, 5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_another_metric_after_a_restart_counts_anew(training: Material, tmp_path: Path) -> None:
    run(training, tmp_path, PATIENT)
    facts = run(training, tmp_path, PATIENT | {"checkpoint__best_metric": "validation.loss"})
    assert (facts["steps"], facts["best_metric"]) == (8, "validation.loss")
    assert facts["best"] == min(row["eval.validation.loss"] for row in rows(tmp_path)[5:])


def test_numbers_that_are_none_are_never_best(training: Material, tmp_path: Path) -> None:
    facts = run(training, tmp_path, PATIENT, lambda _: {"eval.quiz.acc": math.nan})
    assert (facts["steps"], facts["best"], facts["evaluation"]["quiz.acc"]) == (3, None, None)
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_early_stop_needs_evaluations(training: Material, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.early_stop_evaluations=2: .* set eval.every_tokens"):
        run(training, tmp_path, {"train__early_stop_evaluations": 2})
