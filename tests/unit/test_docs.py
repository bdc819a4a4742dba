"""The pages: commands compose, benchmarks take their options, files and tests that are named exist, the tree is the tree."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron_train.commands import cli, recipes, registry
from minitron_train.runtime.launch import World

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")])
LEFT_OUT = re.compile(r"\b(?:COMMAND|NAME|FOLDER|RECIPE)\b|=…|--cfg|hydra/launcher")  # placeholders; sweeps
FORMS = (  # how the pages call the program -> its own words
    (r".*-m minitron_train (\S.*)", r"\1"),
    (r"slurm/chain\.sh (\w+)(.*)", r"run +recipe=\1\2"),
    (r"slurm/search\.sh (\w+)(.*)", r"search +recipe=\1\2"),
    (r"slurm/submit\.sh (\S.*)", r"\1"),
    (r"sbatch slurm/(\w+)\.sbatch(.*)", r"\1\2"),
    (rf"…? ?((?:{'|'.join(registry.COMMANDS)}) .*=.*)", r"\1"),
    (r"… ([\w.]+=.*)", r"run \1"),
)


def snippets() -> list[str]:
    """Every line of the code blocks and all text in backticks; continued lines joined, prompts and comments taken off."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        indented = re.findall(r"^    (\S.*)", text, flags=re.MULTILINE)
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        found += [line for block in (*fenced, *indented, *inline) for line in block.splitlines()]
    return sorted({re.sub(r"^\$ |\s+# .*", "", line.strip()) for line in found})


def commands() -> list[str]:
    """What the program is called with; a lone … stands for other words, options of Slurm are taken off."""
    found = set()
    for line in snippets():
        words = next((match.expand(form) for call, form in FORMS if (match := re.fullmatch(call, line))), None)
        if words and not LEFT_OUT.search(words):
            found.add(" ".join(word for word in words.split() if word != "…" and not word.startswith("--")))
    return sorted(found)


BENCHMARKS = [line for line in snippets() if line.startswith("python benchmarks/")]


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 15 and len(BENCHMARKS) > 10


@pytest.mark.parametrize("line", commands())
def test_every_command_composes(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra accepts it: command, recipe, keys and values are right. Nothing is run."""
    monkeypatch.setattr("sys.argv", ["minitron_train"])
    cli.run(["minitron_train", *shlex.split(line), "--cfg", "job"], World())
    assert "output_dir" in capsys.readouterr().out


class Parsed(Exception):
    """Raised in place of a benchmark's work."""


@pytest.mark.parametrize("line", BENCHMARKS)
def test_every_benchmark_takes_its_options(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, script, *words = shlex.split(line)
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(ROOT / Path(script).parent)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_make_has_its_targets() -> None:
    found = {match[1] for line in snippets() if (match := re.match(r"(?:\w+=\S+ )*make (\w+)", line))}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"quickstart", "test"} <= found <= set(targets)


def test_python_blocks_compile() -> None:
    blocks = [block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_files_that_pages_name_exist() -> None:
    name = (
        r"\b((?:benchmarks|conf|docs|minitron_train|recipes|slurm|tests)/[\w./]+\.(?:py|sh|sbatch|yaml|md|example))\b"
    )
    for page in PAGES:
        for path in re.findall(name, page.read_text().replace("T/", "tests/")):
            assert (ROOT / path).exists() or re.search("[A-Z]{4}", path), f"{page.name}: {path}"


def test_tests_that_faults_are_shown_by_exist() -> None:
    """A row says `T/unit/test_x.py` and in backticks a part of each test's name."""
    rows = re.findall(r"T/([\w/]+\.py)((?:,? `\w+`)*)", (ROOT / "docs" / "faults.md").read_text())
    assert len(rows) > 30
    for file, names in rows:
        text = (ROOT / "tests" / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"def test_\w*{name}", text), f"{file}: {name}"


def tree() -> Iterator[tuple[str, str]]:
    """Path and text of every entry of docs/tree.md."""
    folders: list[str] = []
    block = (ROOT / "docs" / "tree.md").read_text().split("```")[1]
    for indent, name, text in re.findall(r"^( *)([\w.]+/?)(?: +(.*))?$", block, flags=re.MULTILINE):
        folders[len(indent) // 2 :] = [name]
        yield "".join(folders), text


def test_the_page_of_the_tree_is_the_tree() -> None:
    """Each module and each package once, with the first words of its docstring."""
    told, wrong = dict(tree()), []
    assert not [name for name, times in Counter(name for name, _ in tree()).items() if times > 1]
    modules = {path for folder in ("minitron_train", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    for path in sorted(modules - {ROOT / "minitron_train" / "__init__.py"}):
        name = str(path.relative_to(ROOT)).removesuffix("__init__.py")
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        if not told.get(name) or not first.startswith(told[name].removesuffix("…").strip()):
            wrong.append(f"{name}: {first}")
    assert not wrong, "\n".join(["docs/tree.md does not have, as they begin:", *wrong])
    assert all((ROOT / name).exists() for name in told)


def test_the_catalogue_has_every_recipe() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    assert not [name for name in recipes.recipes() if f"| `{name}` |" not in text]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_speak_of_no_machine_of_ours() -> None:
    for page in PAGES:
        assert not re.search(r"/(work|root|home)/\w", page.read_text()), page.name
