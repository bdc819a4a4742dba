"""Renamed keys: the old name works with one warning, both names together are refused."""

from pathlib import Path

import pytest
import yaml

from minitron_train.api import functions as api
from minitron_train.commands import configuration, recipes
from minitron_train.config import Config
from minitron_train.config.renamed import RENAMED, current_settings
from minitron_train.runtime.errors import UserError
from minitron_train.stages import Stage
from minitron_train.stages.stage import changes_since

OLD, NEW = "calibration.teacher_share", "calibration.self_generated_fraction"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of the working directory are those that a test writes."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_each_new_key_is_known_and_stays_in_its_section(old: str, new: str) -> None:
    assert old.rpartition(".")[0] == new.rpartition(".")[0]
    configuration.check_key(new)
    with pytest.raises(UserError, match="unknown key"):
        configuration.check_key(old)


def test_own_files_use_new_keys() -> None:
    for file in [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("conf/*/*.yaml")]:
        settings, section = yaml.safe_load(file.read_text()) or {}, file.parent.name if "conf" in file.parts else ""
        assert current_settings(settings, None, section) == settings, file


@pytest.mark.parametrize("prefix", ["", "++"])
def test_command_line(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert configuration.compose([f"{prefix}{OLD}=0.5"]).calibration.self_generated_fraction == 0.5
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"warning: command line: {OLD} is now called {NEW}; rename it, the next version rejects the old name"
    ]
    assert printed.out == ""  # `--cfg job` and slurm/ read it


def test_text_under_an_old_key_needs_no_quotes() -> None:
    assert (
        configuration.compose(["calibration.tokens=/a (1)/t=x.safetensors"]).calibration.tokens_path
        == "/a (1)/t=x.safetensors"
    )


def test_both_names_are_refused() -> None:
    with pytest.raises(
        UserError, match=rf"command line: {OLD} is the old name of {NEW}, and both are given; remove {OLD}"
    ):
        configuration.compose([f"{NEW}=0.1", f"{OLD}=0.5"])


def test_unknown_keys_are_still_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean 'self_generated_fraction'"):
        configuration.compose(["calibration.self_generated_fractoin=0.5"])


def test_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("recipes/mine.yaml")
    recipe.parent.mkdir()
    recipe.write_text(
        "# mine\ndefaults: [micro, _self_]\ncalibration: {teacher_share: 0.25}\ndistill: {memory_budget_u: 0.5}\n"
    )
    config = configuration.compose(["+recipe=mine"])
    assert (config.calibration.self_generated_fraction, config.distill.logit_memory_fraction) == (0.25, 0.5)
    assert capsys.readouterr().err.count("warning: recipes/mine.yaml: ") == 2
    assert (
        configuration.compose(["+recipe=mine", f"{NEW}=0.1"]).calibration.self_generated_fraction == 0.1
    )  # the command line wins
    recipe.write_text("calibration: {teacher_share: 0.25, self_generated_fraction: 0.5}\n")
    with pytest.raises(UserError, match=rf"recipes/mine.yaml: {OLD} is the old name of {NEW}"):
        configuration.compose(["+recipe=mine"])


def test_only_the_recipes_in_use_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """recipes/ of the working directory may belong to another program."""
    Path("recipes").mkdir()
    Path("recipes/base.yaml").write_text("distill: {memory_budget_u: 0.5}\n")
    Path("recipes/mine.yaml").write_text("defaults: [base, _self_]\nseed: 3\n")
    Path("recipes/other.yaml").write_text("eval: {batch_size: 4, validation_batch_size: 2}\n")
    assert configuration.compose(["+recipe=tiny"]).name == "tiny"
    assert capsys.readouterr().err == ""
    for compose in (lambda: configuration.compose(["+recipe=mine"]), lambda: api.configure({"recipe": "mine"})):
        assert compose().distill.logit_memory_fraction == 0.5
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith("warning: recipes/base.yaml: distill.memory_budget_u is now called")
    with pytest.raises(UserError, match=r"recipes/other.yaml: eval.batch_size is the old name"):
        api.configure({"recipe": "other"})


def test_group_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("conf", "recipes"):
        (tmp_path / folder).mkdir()
        for file in ROOT.glob(f"{folder}/**/*.yaml"):
            target = tmp_path / file.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            target.write_text(file.read_text())
    (tmp_path / "conf/distill/mine.yaml").write_text("memory_budget_u: 0.5\n")
    (tmp_path / "conf/data/mine.yaml").write_text("# @package _global_\ncalibration: {teacher_share: 0.25}\n")
    for module in (configuration, recipes):
        monkeypatch.setattr(module, "home", lambda: tmp_path)
    config = configuration.compose(["distill=mine", "data=mine"])
    assert (config.calibration.self_generated_fraction, config.distill.logit_memory_fraction) == (0.25, 0.5)
    assert f"{tmp_path}/conf/distill/mine.yaml: distill.memory_budget_u is now called" in capsys.readouterr().err


def test_python_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert api.configure({OLD: 0.5}).calibration.self_generated_fraction == 0.5
    assert f"warning: settings: {OLD} is now called {NEW}" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"settings: {OLD} is the old name of {NEW}"):
        api.configure({OLD: 0.5, NEW: 0.5})


def test_records_of_earlier_runs_are_not_stale(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(name="score", folder=Path("s"), inputs={}, settings={"calibration": {"self_generated_fraction": 0.5}})
    record = {"inputs": {}, "settings": {"calibration": {"teacher_share": 0.5}}}
    assert changes_since(record, stage) == []  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().err == ""


def test_configuration_has_no_old_key() -> None:
    assert not {name for name in RENAMED if hasattr(getattr(Config(), name.split(".")[0]), name.split(".")[1])}
