"""What a chain refuses before its first command, that a later one would refuse after hours."""

from pathlib import Path
from typing import Any

import pytest

from minitron_train.commands import chain
from minitron_train.commands.command import execute
from minitron_train.commands.configuration import compose
from minitron_train.commands.registry import COMMANDS
from minitron_train.commands.search import retraining
from minitron_train.config import Config, Recompute, SourceKind
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World


def config(**changes: Any) -> Config:
    """The program's defaults with some `section__key` changed."""
    made = Config()
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(made, section), key, value)
    return made


def check_early(names: list[str], config: Config) -> None:
    """The early checks of some commands."""
    chain.check_early([COMMANDS[name] for name in names], config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__warmup_steps": 10**6}, r"train\.warmup_steps=1000000: longer than the run"),
        (
            {"train__early_stop_evaluations": 3, "eval__every_tokens": 0},
            r"early_stop_evaluations=3: without eval.every_tokens",
        ),
        (
            {"distill__hidden_layers": ["1/1"], "train__recompute": Recompute.full},
            r"train\.recompute=full: does not keep the hidden",
        ),
        ({"train__transformer_engine": True, "data__document_attention": True}, r"supports only a causal mask"),
        (
            {"train__transformer_engine": True, "data__kind": SourceKind.chat, "data__path": "a"},
            r"conversations \(kind=chat\)",
        ),
        ({"parallel__sequence_parallel": True, "parallel__tensor_model_parallel_size": 7}, r"must be a multiple of"),
        ({"checkpoint__best_metric": "validation.kll"}, r"best_metric=validation\.kll: must be one of"),
        ({"eval__training_tasks": ["hellaswagg"]}, "hellaswagg"),
    ],
)
def test_contradictions_of_the_training(changes: dict[str, Any], message: str) -> None:
    check_early(["score", "prune", "distill"], config())
    check_early(["score", "prune"], config(**changes))
    with pytest.raises(UserError, match=message):
        check_early(["score", "prune", "distill"], config(**changes))


def test_candidates_of_a_search_are_trained_without_tasks() -> None:
    """So a task may be the best metric of the run itself; a warm-up is measured by the candidates' own tokens."""
    made = config(
        eval__training_tasks=["hellaswag"], checkpoint__best_metric="hellaswag.acc_norm", train__warmup_steps=10
    )
    check_early(["distill"], retraining(made))
    made.search.retrain_tokens = 1
    with pytest.raises(UserError, match="longer than the run of 1 steps"):
        check_early(["distill"], retraining(made))


@pytest.mark.parametrize(
    "path", ["out/train", "out/teacher/student", "out/../out/pruned", "models/big", "models/big/x"]
)
def test_a_student_is_not_written_into_another_stages_folder(path: str) -> None:
    config = Config(output_dir="out")
    config.teacher.path, config.export.path = "models/big", path
    with pytest.raises(UserError, match=f"export.path={path}: lies in .* choose another folder"):
        check_early(["export"], config)
    config.export.path = "models/small"
    check_early(["export"], config)


def test_calibration_that_is_missing_is_refused_before_the_chain(tmp_path: Path) -> None:
    """Before a teacher is trained for hours."""
    words = ["+recipe=micro", f"output_dir={tmp_path}/out"]
    for word, message in (
        ("calibration.tokens_path=/nowhere/a.safetensors", "tokens_path=/nowhere/a.safetensors: no such file"),
        ("calibration.path=/nowhere/*.txt", r"/nowhere/\*.txt"),
    ):
        with pytest.raises(UserError, match=message):
            execute(COMMANDS["run"], compose([*words, word]), ["run"], World())
    assert not (tmp_path / "out").exists()
