"""dry_run=true: every stage of a chain says its line, in a new folder and in one where some are done; nothing is written."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from minitron_train.commands import configuration
from minitron_train.commands.command import execute
from minitron_train.commands.registry import COMMANDS
from minitron_train.commands.workspace import PENDING, Workspace
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.stages import STARTED
from minitron_train.train import checkpoint_files
from minitron_train.train.export import VerifiedCheckpoint
from tests.support.models import save_tiny

MADE = ["score", "prune", "distill", "export", "eval teacher", "eval pruned", "eval student", "speed"]
FETCHED = ["fetch teacher", "fetch eval data"]
PRETRAINED = ["initialise", "pretrain", "export teacher"]


class Said:
    """Runs a command and reads what it says."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def __call__(self, command: str, *words: str) -> list[str]:
        config = configuration.compose([*words, f"output_dir={self.folder}"])
        execute(COMMANDS[command], config, [], World())
        return self.capsys.readouterr().out.splitlines()

    def states(self, command: str, *words: str) -> dict[str, str]:
        """Stage -> missing, finished, stale (why)."""
        lines = [line for line in self(command, *words, "dry_run=true") if not line.startswith((" ", "precision auto"))]
        return dict(line.split(": ", 1) for line in lines)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    return Said(capsys, tmp_path / "run")


@pytest.mark.parametrize(("recipe", "first"), [("smollm2", FETCHED), ("tiny", PRETRAINED)])
def test_a_chain_in_a_new_folder(said: Said, recipe: str, first: list[str]) -> None:
    states = said.states("run", f"+recipe={recipe}")
    assert list(states) == [*first, *MADE, "report"]
    assert {states[name] for name in (*first, *MADE)} == {"missing"}
    assert not said.folder.exists()


def test_what_is_to_come_is_said_so(said: Said) -> None:
    lines = said("run", "+recipe=tiny", "dry_run=true")
    assert f"  reads   checkpoint {PENDING}" in lines and f"  reads   scores {PENDING}" in lines
    assert "  keeps   3,937,152 of 7,019,008 parameters" in lines, "the recipe tells the shapes"


def test_a_teacher_whose_shape_nobody_knows_yet(said: Said) -> None:
    states = said.states("run", "+recipe=smollm2", "model=none")
    assert states["score, prune"].startswith("would run; the shapes are known once ")
    assert states["distill"] == "missing" and "report" in states


@pytest.mark.parametrize(
    ("command", "message"), [("prune", "no teacher in .*; run .* fetch"), ("export", "contains no training checkpoint")]
)
def test_a_stage_without_its_input_is_refused_as_ever(said: Said, command: str, message: str) -> None:
    """No stage of this dry run makes the input."""
    with pytest.raises(UserError, match=message):
        said(command, "+recipe=smollm2", "dry_run=true")


def test_training_without_a_student_is_refused_as_ever(said: Said, tmp_path: Path) -> None:
    teacher = save_tiny("nemotron", tmp_path / "teacher")
    with pytest.raises(UserError, match=r"no student in .*pruned; run prune first"):
        said("distill", f"teacher.path={teacher}", "dry_run=true")


def test_an_export_that_was_done_is_finished(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint is the one that the real command finds; a changed setting or a new checkpoint makes it stale."""

    def save(step: int) -> None:
        path = checkpoint_files.checkpoint_path(said.folder / "train" / "checkpoints", step)
        path.mkdir(parents=True)
        (path / checkpoint_files.MANIFEST).write_text(f'{{"step": {step}, "files": {{}}, "belongs_to": {{}}}}')

    def write(checkpoint: VerifiedCheckpoint, folder: Path, dtype: str | None) -> Mapping[str, Any]:
        return {"checkpoint": checkpoint.path.name}

    save_tiny("nemotron", said.folder / "train" / "checkpoints" / "model")
    (said.folder / "train" / STARTED).write_text('{"inputs": {}, "settings": {}}')
    save(40)
    monkeypatch.setattr("minitron_train.train.export.export_checkpoint", write)
    assert said.states("export") == {"export": "missing"}
    said("export", "plan.check=false")
    assert said.states("export") == {"export": "finished"}
    assert "  again   although it is finished" in said("export", "dry_run=true", "force=true")
    assert said.states("export", "export.dtype=float16") == {"export": "stale (dtype was None, is float16)"}
    save(50)
    stale = re.escape("stale (input checkpoint was step_00000040:") + r"\w{12}, is step_00000050:\w{12}\)"
    assert re.fullmatch(stale, said.states("export")["export"])


def test_what_follows_a_stage_that_would_be_done_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        ws = Workspace(configuration.compose([f"output_dir={tmp_path}", "dry_run=true"]), [], World(), stack)
        (tmp_path / "pruned").mkdir()
        assert ws.is_there(ws.pruned_folder) and not ws.is_there(ws.student_folder)
        assert ws.identity(ws.pruned_folder, lambda: "of now") == "of now"
        ws.mark_pending(tmp_path / "pruned")
        assert ws.identity(ws.pruned_folder / "config.json", lambda: "of now") == PENDING
        assert list(ws.models_to_evaluate()) == ["pruned"]
