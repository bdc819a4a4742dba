"""Stages: done once, done again when something changed, never damaged by a failure."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_train.errors import UserError
from minitron_train.stages import Invocation, Stage, read_provenance, run_stage

INVOCATION = Invocation(["python", "-m", "minitron_train", "test"], {"seed": 1})


def run(stage: Stage, text: str = "done", force: bool = False, fail: bool = False) -> bool:
    def work(folder: Path) -> Mapping[str, Any]:
        (folder / "result").write_text(text)
        if fail:
            raise RuntimeError
        return {"answer": 42}

    return run_stage(stage, INVOCATION, work, force=force, is_first=True, share=lambda value: value)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(
        name="prune", folder=tmp_path / "out", inputs={"teacher": "abc"}, settings={"student": {"hidden_size": 8}}
    )


def test_a_finished_stage_is_not_done_twice(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stage)
    assert not run(stage, "again")
    assert "done before" in capsys.readouterr().out
    assert (stage.folder / "result").read_text() == "done"
    assert run(stage, "forced", force=True)
    assert (stage.folder / "result").read_text() == "forced"


def test_provenance_says_how_it_came_about(stage: Stage) -> None:
    run(stage)
    record = read_provenance(stage.folder)
    assert record["stage"] == "prune"
    assert record["command"] == "python -m minitron_train test"
    assert record["inputs"] == {"teacher": "abc"}
    assert record["facts"] == {"answer": 42}
    assert record["peak_rss_bytes"] > 0
    assert record["packages"]["torch"].startswith("2.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"teacher": "xyz"}}, "input teacher was abc, is xyz"),
        ({"settings": {"student": {"hidden_size": 4}}}, "student.hidden_size was 8, is 4"),
    ],
)
def test_a_change_makes_it_stale_and_is_said(
    stage: Stage, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    run(stage)
    assert run(replace(stage, **change), "new")
    assert f"stale ({message})" in capsys.readouterr().out
    assert (stage.folder / "result").read_text() == "new"


def test_a_failed_second_run_keeps_the_first(stage: Stage) -> None:
    run(stage)
    with pytest.raises(RuntimeError):
        run(stage, "half", force=True, fail=True)
    assert (stage.folder / "result").read_text() == "done"
    assert stage.state() == ("finished", "")


def test_a_growing_stage_goes_on_but_not_with_other_settings(stage: Stage) -> None:
    training = replace(stage, manner="grows")
    with pytest.raises(RuntimeError):
        run(training, "step 5", fail=True)
    assert (training.folder / "result").read_text() == "step 5", "what has grown stays"
    with pytest.raises(UserError, match=r"student.hidden_size was 8, is 4"):
        run(replace(training, settings={"student": {"hidden_size": 4}}))
    assert run(training, "step 9")
    with pytest.raises(UserError, match="force=true"):
        run(replace(training, inputs={"teacher": "xyz"}))
