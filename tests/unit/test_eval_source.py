"""Evaluation of a training checkpoint without an export, and of the live student in a real training run."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.arch.convert import read_shard
from minitron_train.config import Config, EvalConfig
from minitron_train.evaluation import scoring
from minitron_train.evaluation.hooks import TaskHook
from minitron_train.evaluation.run import evaluate_model
from minitron_train.evaluation.source import locate, open_origin
from minitron_train.parallel.groups import start
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.train.export import export_checkpoint
from minitron_train.train.run import train
from tests.support.eval_data import save_data
from tests.support.training import Material, make_config, make_material, rows


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"))


def run(material: Material, folder: Path, **evaluation: Any) -> list[dict[str, Any]]:
    """A training run, with the hook when it has tasks; returns what it logged."""
    config = make_config(material, **{f"eval__{key}": value for key, value in evaluation.items()})
    data_dir = save_data(folder / "data")
    with start(config.parallel, World(), config.seed) as groups:
        hooks = [TaskHook(config.eval, material.student, 128, groups, data_dir)] if evaluation else []
        train(config, groups, student=material.student, teacher=material.teacher, folder=folder / "train", hooks=hooks)
    return rows(folder / "train")


@pytest.fixture(scope="module")
def trained(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without the hook."""
    folder = tmp_path_factory.mktemp("trained")
    run(material, folder)
    return folder / "train"


def test_tasks_on_the_live_student_leave_training_as_it_was(material: Material, trained: Path, tmp_path: Path) -> None:
    plain = rows(trained)
    hooked = run(material, tmp_path, training_tasks=["hellaswag"], training_limit=4, every_tokens=512)
    assert [row["loss"] for row in hooked] == [row["loss"] for row in plain]
    found = [row for row in hooked if "eval.hellaswag.acc_norm" in row]
    assert len(found) > 1 and all("eval.hellaswag.acc_norm.teacher" in row for row in found)


def test_a_signal_ends_tasks_after_a_batch(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start evaluates what is missing, and logs what an uninterrupted run logs."""
    settings = {"training_tasks": ["hellaswag"], "training_limit": 4, "every_tokens": 1024, "batch_tokens": 64}
    whole = run(material, tmp_path / "whole", **settings)
    batches: list[int] = []
    original = scoring.score_rows

    def counted(*arguments: Any) -> dict[int, scoring.Score]:
        batches.append(len(batches))
        if len(batches) == stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments)

    monkeypatch.setattr(scoring, "score_rows", counted)
    stop_at = 0
    run(material, tmp_path / "counted", **settings)
    num_batches, stop_at = len(batches), 2
    batches.clear()
    with pytest.raises(SystemExit):
        run(material, tmp_path / "resumed", **settings)
    assert len(batches) == 2 and (tmp_path / "resumed" / "train" / "tasks.partial" / "teacher").exists()
    stop_at = 6
    with pytest.raises(SystemExit):
        run(material, tmp_path / "resumed", **settings)
    assert len(batches) == 6
    assert run(material, tmp_path / "resumed", **settings) == whole
    assert len(batches) == num_batches, "no batch was computed twice"
    assert not list((tmp_path / "resumed" / "train").glob("*.partial"))


def test_checkpoint_gives_the_exports_tensors_and_figures(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    checkpoint = locate(trained, trained, trust_external=True)
    export_checkpoint(checkpoint, tmp_path / "student")
    saved, exported = open_origin(checkpoint), open_origin(tmp_path / "student")
    for row in saved.table.rows_of(saved.shape):
        for i in row.layers(saved.shape):
            for rank in range(2):
                shards = [read_shard(row, i, saved.shape, origin.source, rank, 2) for origin in (saved, exported)]
                assert torch.equal(*shards), row.mcore
    assert saved.num_parameters == exported.num_parameters
    config = Config()
    config.eval = EvalConfig(tasks=["hellaswag"], limit=3)
    data_dir = save_data(tmp_path / "data")
    tokens = torch.arange(66).view(2, 33)
    reports = []
    for model in (checkpoint, tmp_path / "student"):
        with start(config.parallel, World(), seed=1) as groups:
            report = evaluate_model(
                config, groups, model=model, label="m", folder=tmp_path, data_dir=data_dir, validation_tokens=tokens
            )
        reports.append({key: report[key] for key in ("results", "perplexity", "parameters")})
    assert reports[0] == reports[1]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: no such file"):
        open_origin(tmp_path)
