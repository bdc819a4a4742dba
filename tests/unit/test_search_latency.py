"""search.budget=latency_ms: measured once per shape, kept in a file, used as the other budgets are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.commands import slurm
from minitron_train.commands.command import execute
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import Budget, CalibrationConfig, Config, Precision, SearchConfig, SpeedConfig
from minitron_train.evaluation import latency
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from tests.support.models import save_tiny

CONTEXT = 100


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("latency") / "teacher")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the clock: a shape takes a millisecond per layer and per 32 channels. Lists what was measured."""
    names: list[str] = []

    def fake(student: Any, shape: Any, *_: Any) -> float:
        assert (student["num_hidden_layers"], student["hidden_size"]) == (shape.num_layers, shape.hidden_size)
        names.append(f"{shape.num_layers} {shape.hidden_size}")
        return shape.num_layers + shape.hidden_size / 32

    monkeypatch.setattr(latency, "latency_ms", fake)
    return names


def config_of(folder: Path, teacher: Path, **changes: Any) -> Config:
    grid: dict[str, Any] = {"num_layers": [1, 2, 3], "hidden_size": [32, 64], "context": CONTEXT, "target": 4.0}
    config = Config(
        output_dir=str(folder),
        search=SearchConfig(budget=Budget.latency_ms, **{**grid, **changes}),
        speed=SpeedConfig(new_tokens=2, turns=2, precision=Precision.fp32),
        calibration=CalibrationConfig(num_samples=64, seq_length=128),
    )
    config.teacher.path = str(teacher)
    return config


def search(config: Config) -> list[dict[str, Any]]:
    execute(COMMANDS["search"], config, ["search"], World())
    return json.loads((Path(config.output_dir) / "search.json").read_text())["candidates"]


def test_candidates_have_the_measured_latency(tmp_path, teacher, measured, capsys):
    found = search(config_of(tmp_path, teacher))
    assert sorted((row["num_layers"], row["hidden_size"], row["latency_ms"]) for row in found) == [
        (2, 64, 4),
        (3, 32, 4),
    ]
    printed = capsys.readouterr().out
    assert "the teacher takes 5 ms per token" in printed and "ms/token" in printed
    assert len(measured) == 7, "six shapes and the teacher"


def test_a_shape_is_measured_once(tmp_path, teacher, measured):
    search(config_of(tmp_path, teacher, num_layers=[2]))
    assert measured == ["3 64", "2 64", "2 32"]
    search(config_of(tmp_path, teacher, num_layers=[2, 3]))
    assert measured[3:] == ["3 64", "3 32"], "the new ones, under their own names"
    search(config_of(tmp_path, teacher, num_layers=[2, 3], context=CONTEXT - 1))
    assert len(measured) == 5 + 5, "another context is another latency"


def test_values_of_another_machine_are_used_whole_or_not_at_all(tmp_path, teacher, measured, capsys):
    search(config_of(tmp_path, teacher, num_layers=[2]))
    file = tmp_path / "search" / "latency.json"
    record = json.loads(file.read_text())
    record["conditions"]["machine"]["device"] = "another processor"
    file.write_text(json.dumps(record))
    search(config_of(tmp_path, teacher, num_layers=[2]))
    assert len(measured) == 3 and "latencies of another processor" in capsys.readouterr().out
    search(config_of(tmp_path, teacher, num_layers=[2, 3]))
    assert len(measured) == 3 + 5 and "another processor" not in file.read_text()
    forced = config_of(tmp_path, teacher, num_layers=[2])
    forced.force = True
    search(forced)
    assert len(measured) == 3 + 5 + 3


def test_a_dry_run_measures_nothing(tmp_path, teacher, measured, capsys):
    config = config_of(tmp_path, teacher)
    config.dry_run = True
    execute(COMMANDS["search"], config, ["search"], World())
    assert measured == [] and "would measure the latency of 6 shapes" in capsys.readouterr().out


def test_the_tolerance_is_wider_unless_it_is_set(tmp_path, teacher, measured):
    with pytest.raises(
        UserError, match=r"target=7: none of 6 shapes has latency_ms within ±15\.0%; the nearest, .* has 5;"
    ):
        search(config_of(tmp_path, teacher, target=7.0))
    with pytest.raises(UserError, match=r"within ±1\.0%"):
        search(config_of(tmp_path, teacher, target=4.5, tolerance=0.01))
    assert SearchConfig().allowed_distance == 0.05
    with pytest.raises(UserError, match=r"search\.target is not set: a search needs the latency_ms to aim at"):
        search(config_of(tmp_path, teacher, target=None))
    with pytest.raises(UserError, match=r"search\.context \+ speed\.new_tokens=130: the teacher was made for 128"):
        search(config_of(tmp_path, teacher, context=128))


def test_the_jobs_of_an_array_need_latencies_that_were_measured_before(tmp_path, teacher, measured):
    config = config_of(tmp_path, teacher, evaluate=True)
    with pytest.raises(UserError, match=r"latency\.json: holds no latency of .*; measure first: run `search` with"):
        slurm.search_candidates(config, World())
    search(config_of(tmp_path, teacher))
    assert [candidate.latency_ms for candidate in slurm.search_candidates(config, World())] == [4, 4]
    (tmp_path / "search" / "latency.json").write_text('{"conditions": {}}')
    with pytest.raises(UserError, match=r"latency\.json: damaged \(.*\); remove it and run `search` again"):
        slurm.search_candidates(config, World())


def test_a_latency_is_that_of_decoding_after_the_context(teacher, monkeypatch, tmp_path):
    """The real clock; and how many tokens each timed pass sees."""
    from minitron_train.evaluation import timing
    from minitron_train.hf import folder_shape, read_json

    lengths: list[int] = []
    original = timing.next_token

    def noted(model: Any, tokens_BS: Any, cache: Any) -> Any:
        lengths.append(cache.get_seq_length())
        assert tokens_BS.shape == (3, 1)
        return original(model, tokens_BS, cache)

    monkeypatch.setattr(timing, "next_token", noted)
    config = config_of(tmp_path, teacher, batch_size=3)
    shape = folder_shape(teacher)
    assert latency.latency_ms(read_json(teacher / "config.json"), shape, config, torch.float32, torch.device("cpu")) > 0
    assert lengths == [CONTEXT, CONTEXT + 1] * 3, "a warm-up and two turns"
