"""Paths and other text on the command line: any characters, as they stand."""

import os
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from minitron_train.commands import configuration
from minitron_train.commands.overrides import expand_paths, paths, quote_word, quote_words
from minitron_train.commands.registry import COMMANDS
from minitron_train.commands.slurm import accept
from minitron_train.config import Config
from minitron_train.runtime.errors import UserError

VALUES = [
    "/a/b c (1)/x=y",
    "epoch=1-step=200",
    "모델/Müller/日本",
    "run (2)",
    "a,b",
    "it's",
    'say "x"',
    "both ' and \"",
    "R&D; rm -rf|x<y>z",
    "backup~",
    "a#1",
    "[x]{y}",
    "{a: 1}",
    "[a, b]",
    "$HOME/$x%y@z",
    "2024-01-01/007",
    "1e3",
    "0x10",
    "1_000",
    "12",
    "true",
    "NaN",
    "inf",
    "nothing.",
    "trailing...",
    " leading",
    "trailing ",
    "tab\tx",
    "line\nfeed",
    "back\\slash",
    "end\\",
    "quote\\'",
    "a:b::c",
    "é\\ b",
    "\\, ~",
    "!x*y?[z]",
    "^`x`",
    "*.jsonl.{gz,bz2}",
    "choice(a,b)",
    "glob(*)",
    "-dash",
    "+plus",
    "é",
    "👍",
    "''x",
    "a'b'",
    "null/x",
    "@x",
    ".",
    "..",
    "",
]


def parsed(word: str, *, sweeping: bool = False) -> object:
    """What Hydra makes of a word, as text."""
    override = OverridesParser.create().parse_override(quote_word(word, sweeping=sweeping))
    assert not override.is_sweep_override()
    return str(override.value()) if override.value() is not None else None


@pytest.mark.parametrize("value", VALUES)
def test_any_characters_arrive_as_they_stand(value: str) -> None:
    for key in ("teacher.path", "output_dir", "data.sources.mine.path", "+calibration.tokens_path", "name"):
        assert parsed(f"{key}={value}") == value


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("null", None), ("'/a b'", "/a b"), ('"a, [b]"', "a, [b]"), (r"/a\ b\=c", "/a b=c"), ("'it\\'s'", "it's")],
)
def test_what_hydra_gives_a_meaning_keeps_it(value: str, meaning: str | None) -> None:
    assert parsed(f"teacher.path={value}") == meaning


def test_other_words_are_left_alone() -> None:
    words = ["train.num_tokens=5", "eval.tasks=[a,b]", "+data.sources={a: {path: x}}", "~eval", "--cfg", "prune=none"]
    words += ["+recipe=tiny", "unknown.key=a b", "teacher.path=/plain/path-1.x", "no_equals (x)"]
    assert quote_words(words) == words


def test_sweeps_stay_sweeps() -> None:
    parser = OverridesParser.create()

    def values(value: str) -> list[str]:
        override = parser.parse_override(quote_words(["-m", f"teacher.path={value}"])[1])
        return [str(choice) for choice in override.sweep_string_iterator()] if override.is_sweep_override() else []

    assert values("/a,/b") == ["/a", "/b"]
    assert values("/a b,/c=d") == ["'/a b'", "'/c=d'"]
    assert values("'/a,b',/c (1)") == ["'/a,b'", "'/c (1)'"]
    assert values("choice(a,b)") == ["a", "b"]
    assert parsed("teacher.path=/a b", sweeping=True) == "/a b"


def test_the_keys_that_take_a_path() -> None:
    config = configuration.compose(["+recipe=tiny", "+data.sources={a: {path: x}}"])
    for section, name, _ in list(paths(config)):
        assert isinstance(getattr(section, name), str)
    marked = {f"{name}.{f}" for name in Config.__dataclass_fields__ for f in path_fields(getattr(config, name))}
    assert marked == {
        *(
            "teacher.path",
            "teacher.cache",
            "student.path",
            "student.pruned_from",
            "calibration.save_path",
            "export.path",
            "export.checkpoint",
            "calibration.path",
            "calibration.tokens_path",
        ),
        *("data.path", "data.validation_path", "data.cache_dir", "eval.model", "eval.data_dir"),
    }


def path_fields(section: object) -> list[str]:
    """Names of a section's path fields."""
    fields = getattr(section, "__dataclass_fields__", {})
    return [name for name, field in fields.items() if field.metadata.get("path")]


def test_home_and_interpolations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = configuration.compose(
        ["output_dir=~/my runs/${name}/x=1", "name=a b", "teacher.path='~/t'", "data.path=x~/~"]
    )
    assert config.output_dir == f"{tmp_path}/my runs/a b/x=1"
    assert config.teacher.path == f"{tmp_path}/t" and config.data.path == "x~/~"
    assert configuration.compose(["teacher.path=/\\${name}"]).teacher.path == "/${name}"
    for value in ("/${name", "/${nothing}", "/${}"):
        with pytest.raises(UserError) as caught:
            configuration.compose([f"teacher.path={value}"])
        assert "\n" not in str(caught.value)


def test_sources_by_their_own_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = configuration.compose(["+recipe=tiny", "data.sources.prose.path=~/a (1)"])
    assert config.data.sources["prose"].path == f"{tmp_path}/a (1)"


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    config = Config()
    for path, message in (
        (str(loop), "teacher.path=.*links form a circle"),
        (str(loop / "x"), "links form a circle"),
        ("x" * 300, "too long"),
        ("x/" * 3000, "too long"),
        ("a\0b", "is not a path"),
    ):
        config.teacher.path = path
        with pytest.raises(UserError, match=message) as caught:
            expand_paths(config)
        assert len(str(caught.value)) < 400


def test_undecodable_bytes() -> None:
    word = "teacher.path=" + os.fsdecode(b"/a/\xff")
    with pytest.raises(UserError, match=r"argument 'teacher\.path=/a/\\udcff': is not UTF-8"):
        configuration.compose([word])


def test_a_recorded_command_can_be_given_again() -> None:
    word = "teacher.path=/a b/it's (1),x"
    assert parsed(shlex.split(shlex.join([word]))[0]) == "/a b/it's (1),x"


def test_slurms_scripts_read_the_output_folder_as_one_line() -> None:
    accept([COMMANDS["report"]], Config(output_dir="/a b (1)/é=x"))
    with pytest.raises(UserError, match=r"output_dir='a\\nb': must be one printable line"):
        accept([COMMANDS["report"]], Config(output_dir="a\nb"))
