"""The command line: help, resolved configuration, and one clear line for every mistake."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from minitron_train.commands import cli, configuration, help, recipes, registry
from minitron_train.commands.chain import chain
from minitron_train.commands.command import execute
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, StudentConfig
from minitron_train.runtime.errors import UserError, too_many_files
from minitron_train.runtime.launch import World


def minitron(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minitron_train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), RuntimeError("socket.cc:24: Too many open files")]
)
def test_too_many_open_files_are_one_line(error: Exception) -> None:
    """Of the system, and of gloo; the limit is the process's own."""
    assert re.fullmatch(r"ulimit -n is \d+: too many open files; raise it .*", str(too_many_files(error)))
    assert too_many_files(OSError(28, "No space left on device")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prun"], "unknown command 'prun' (did you mean 'prune'?); commands: fetch pretrain"),
        (["prune", "+recipe=tinny"], "unknown recipe 'tinny' (did you mean 'tiny'?); choose one of: "),
        (["prune", "recipe=tiny"], "a recipe is added with a plus: +recipe=tiny"),
        (["prune", "student.hiden_size=4"], "unknown key 'student.hiden_size' (did you mean 'hidden_size'?)"),
        (["prune", "sed=4"], "unknown key 'sed' (did you mean 'seed'?)"),
        (["prune", "seed.x=4"], "seed is a value, not a section"),
        (["prune", "train=default"], "train is a section without presets; set its keys, as train."),
        (["prune", "prune=modelop"], "unknown preset of prune 'modelop' (did you mean 'modelopt'?)"),
        (["plan", "data.sources.mine.path=x"], "'+data.sources={NAME: {path: FILE, weight: 1}}'"),
        (["prune", "tiny"], "argument 'tiny': a recipe is added with a plus: +recipe=tiny\n"),
        (["prune", "--recipe=tiny"], "argument '--recipe=tiny': a recipe is added with a plus: +recipe=tiny\n"),
        (["prune", "fast"], "settings look like key=value"),
        (["prune", "student.hidden_size=big"], "error: student.hidden_size=big: must be a whole number\n"),
        (["prune", "student.hidden_size=0"], "student.hidden_size=0: must be greater than 0"),
        (["prune"], "no teacher in outputs/custom/teacher; give teacher.path=FOLDER"),
        (["prune", "teacher.path=nowhere"], "teacher.path=nowhere: no such folder"),
        (["prune", "+recipe=4b"], "was never published as a Hugging Face folder"),
        (["distill", "+recipe=smollm2"], "run `python -m minitron_train fetch +recipe=smollm2` first"),
        (["eval"], "nothing to evaluate in outputs/custom"),
        (["train"], "unknown command 'train'"),
        (["plan", "+hydra_x=1"], "unknown key 'hydra_x'"),
        (["plan", "+recipe=smollm2", "train.seq_length=9000"], "train.seq_length=9000: the teacher was made for 8192"),
        (["run", "+recipe=tiny", "eval.tasks=[hellaswagg]"], "hellaswagg"),
        (["run", "+recipe=tiny", "eval.data_dir=nowhere"], "eval.data_dir=nowhere: no such folder"),
        (["run", "+recipe=tiny", "train.warmup_steps=9999"], "train.warmup_steps=9999: longer than the run of"),
        (["plan", "--resolve", "sed=4"], "unknown key 'sed'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = minitron(*arguments, cwd=tmp_path)
    assert message in result.stderr
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_file_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: object) -> None:
        raise PermissionError(13, "Permission denied", "/teacher/model.safetensors")

    command = dataclasses.replace(registry.COMMANDS["score"], run=read)
    with pytest.raises(UserError, match=r"/teacher/model\.safetensors: permission denied"):
        execute(command, Config(), [], World())


def test_a_sweep_names_the_mistakes_of_all_its_jobs(tmp_path: Path) -> None:
    result = minitron("distill", "-m", "teacher.path=a,b", "seed=1,2", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert result.returncode == 2
    line = "; ".join(f"teacher.path={name}: no such folder; give a Hugging Face folder" for name in "ab")
    assert result.stderr == f"error: {line}\n"


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (["eval", "--help"], ""),
        (["eval", "--help"], "1"),
        (["plan", "--cfg", "job"], ""),
        (["search", "+recipe=4b"], ""),
    ],
)
def test_a_reader_that_leaves_ends_it_silently(tmp_path: Path, words: list[str], unbuffered: str) -> None:
    """As `| head` does, here before the first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minitron_train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        cwd=tmp_path,
    )
    assert process.stdout
    process.stdout.close()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, b"")


def test_other_pipes_that_break_are_errors(tmp_path: Path) -> None:
    code = (
        "from minitron_train import __main__\nfrom minitron_train.commands import cli\n"
        "def run(*_): raise BrokenPipeError(32, 'of a worker')\n"
        "cli.run = run; __main__.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "of a worker" in result.stderr


@pytest.mark.parametrize("option", ["--cfg", "-c"])
def test_resolved_configuration(tmp_path: Path, option: str) -> None:
    result = minitron("prune", "+recipe=4b", option, "job", "--resolve", cwd=tmp_path)
    assert result.returncode == 0
    assert "output_dir: outputs/4b" in result.stdout
    assert "hidden_size: 3072" in result.stdout
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch_and_no_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from minitron_train.commands import cli; from minitron_train.runtime.launch import World\n"
        "for argv in (['m', '--help'], ['m', 'distill', '--help']): cli.run(argv, World())\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "train.global_batch_size=" in result.stdout


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("pretrain", {"num_tokens": 0}, r"pretrain\.num_tokens=0: must be greater than 0"),
        ("pretrain", {"min_lr": 1.0}, r"pretrain\.min_lr=1\.0: must lie between 0 and pretrain\.lr=0\.001"),
        ("plan", {"family": {"small": StudentConfig(num_layers=0)}}, r"plan\.family\.small\.num_layers=0: must be"),
        ("eval", {"every_tokens": -1}, r"eval\.every_tokens=-1: must not be negative"),
        ("eval", {"compare": ["a"]}, r"eval\.compare=\['a'\]: must have two labels or more"),
        ("cluster", {"price_per_gpu_hour": -1.0}, r"cluster\.price_per_gpu_hour=-1\.0: must be greater than 0"),
        ("cluster", {"reserved_gib": -1.0}, r"cluster\.reserved_gib=-1\.0: must not be negative"),
        ("data", {"validation_fraction": 0.0}, r"data\.validation_fraction=0\.0: leaves nothing to validate on"),
    ],
)
def test_sections_refuse(section: str, values: dict[str, Any], message: str) -> None:
    config = Config()
    config.validate()
    for name, value in values.items():
        setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=message):
        config.validate()


@pytest.mark.parametrize(
    ("word", "choices"),
    [
        ("export.dtype=int3", "float32, bfloat16, float16"),
        ("teacher.source=ftp", "hub, wheel, pretrain"),
        ("search.budget=money", "parameters, non_embedding_parameters, memory_gib, latency_ms"),
        ("prune.neuron_activation=mid", "pre, post"),
        ("prune.head_norm=row", "channel, token"),
    ],
)
def test_a_name_that_is_no_choice_is_refused_with_the_choices(word: str, choices: str) -> None:
    with pytest.raises(UserError) as refused:
        configuration.compose([word])
    line = str(refused.value)
    assert line.startswith(f"{word}: ") and f"one of [{choices}]" in line and "\n" not in line


def test_a_folder_does_not_pass_for_a_model_of_the_run(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"))
    for folder in ("run/student", "other/student", "other/step_00000001"):
        (tmp_path / folder).mkdir(parents=True)

    def models(model: str | None, label: str | None = None) -> dict[str, Path]:
        config.eval.model, config.eval.label = model, label
        return Workspace(config, [], World(), ExitStack()).models_to_evaluate()

    own, other, step = (str(tmp_path / name) for name in ("run/student", "other/student", "other/step_00000001"))
    assert models(None) == models("student") == models(own) == {"student": Path(own)}
    assert models(step) == {"step_00000001": Path(step)} and models(other, "theirs") == {"theirs": Path(other)}
    for model in (other, "."):
        with pytest.raises(UserError, match="needs a name other than teacher, pruned, student, checkpoint"):
            models(model)


def help_of(name: str, *words: str) -> str:
    """What `NAME … --help` prints."""
    return help.command_help(name, configuration.compose(list(words)))


@pytest.mark.parametrize("name", list(registry.COMMANDS))
def test_every_command_has_help(name: str) -> None:
    assert f"usage: python -m minitron_train {name}" in help_of(name)


def test_help_shows_the_values_that_a_run_would_have() -> None:
    """A recipe and the command line win over the defaults."""
    assert "  prune.rotate=True " in help_of("prune")
    assert "  data.sources={prose, code} " in help_of("distill", "+recipe=tiny")
    shown = help_of("prune", "+recipe=4b", "prune.ridge=0.5")
    assert "  prune.rotate=False " in shown and "  student.hidden_size=3072 " in shown and "  prune.ridge=0.5 " in shown


def test_help_takes_no_value_of_an_option_for_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["minitron_train", "prune", "--cfg", "job", "+recipe=4b", "--help"], World())
    assert "  student.hidden_size=3072 " in capsys.readouterr().out


def test_recipes_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# Mine\nstudent: {hidden_size: 77}\n")
    assert "unknown recipe 'mine'" in minitron("plan", "+recipe=mine", cwd=tmp_path / "recipes").stderr
    monkeypatch.chdir(tmp_path)
    config = configuration.compose(["+recipe=mine"])
    assert (config.name, config.student.hidden_size, config.output_dir) == ("mine", 77, "outputs/mine")


def test_a_student_of_ones_own_is_not_made() -> None:
    own = configuration.compose(["+recipe=tiny", "student.path=x"])
    after = ["distill", "export", "eval", "speed", "report"]
    assert [command.name for command in chain(own)] == ["fetch", "pretrain", *after]
    unmeasured = configuration.compose(["+recipe=tiny", "student.path=x", "speed.in_run=false"])
    assert "speed" not in [command.name for command in chain(unmeasured)]
    whole = [command.name for command in chain(configuration.compose(["+recipe=tiny"]))]
    assert whole[2:4] == ["score", "prune"]


@pytest.mark.parametrize("name", list(recipes.recipes()))
def test_every_recipe_composes(name: str) -> None:
    from hydra import compose, initialize_config_dir

    recipes.register_recipes()
    with initialize_config_dir(str(recipes.home() / "conf"), version_base="1.3"):
        config = configuration.to_config(compose("config", [f"+recipe={name}"]))
    assert config.name == name
    assert config.output_dir == f"outputs/{name}"


def test_keys_that_users_name_themselves_pass() -> None:
    configuration.check_override("data.sources.mine.path=x")
    configuration.check_override("+recipe=tiny,smollm2")
    with pytest.raises(UserError):
        configuration.check_override("data.sorces.mine.path=x")
