"""The pages: every command in them composes, every file of the tree is in the README's, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from minitron_train import cli
from minitron_train.parallel.launch import World

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")])


def commands() -> list[str]:
    """Every `python -m minitron_train …` in a code block or in backticks, continued lines joined, placeholders left out."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^\s*(?:\w+=\S+ )*.*?-m minitron_train (\S.*)$", text, flags=re.MULTILINE):
            line = line.split("`")[0].split(" #")[0].strip()
            if not re.search(r"--cfg|hydra/launcher|…|COMMAND|NAME|FOLDER|\||\.\.\.", line):
                found.append(line)
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_every_command_composes(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra accepts it: command, recipe, keys and values are right. Nothing is run."""
    monkeypatch.setattr("sys.argv", ["minitron_train"])
    cli.run(["minitron_train", *shlex.split(line), "--cfg", "job"], World())
    assert "output_dir" in capsys.readouterr().out


def test_the_tree_of_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    folders = ("minitron_train", "conf", "recipes", "slurm", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    missing = [str(path.relative_to(ROOT)) for path in files if path.name not in text]
    assert not missing


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_speak_of_no_machine_of_ours() -> None:
    for page in PAGES:
        assert not re.search(r"/(work|root|home)/\w", page.read_text()), page.name
