"""The registry of commands: what slurm/, the chain and the sections of the configuration say agrees with it."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_train.commands.chain import CHAIN
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import Config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "minitron_train" / "commands"


def test_every_command_file_is_in_the_registry() -> None:
    files = {file.stem for file in FOLDER.glob("*.py") if re.search(r"^COMMAND = ", file.read_text(), re.MULTILINE)}
    modules = {command.run.__module__.rpartition(".")[2] for command in COMMANDS.values()}
    assert files == modules and len(files) == len(COMMANDS)


def test_a_script_for_slurm_asks_for_what_the_registry_says() -> None:
    scripts = {file.stem: file.read_text() for file in (ROOT / "slurm").glob("*.sbatch")}
    assert scripts.keys() == {name for name, command in COMMANDS.items() if command.job}
    for name, text in scripts.items():
        job = COMMANDS[name].job
        assert job and re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE) == job.directives(name), name


def test_the_table_of_the_readme_says_the_same() -> None:
    text = (ROOT / "README.md").read_text().replace("`", "")
    rows = {
        name: [reads, writes]
        for name, reads, writes in re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \|", text, re.MULTILINE)
    }
    assert {name: found for name, found in rows.items() if name in COMMANDS} == {
        name: [command.reads, command.writes] for name, command in COMMANDS.items()
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_sections_exist(name: str) -> None:
    assert {*COMMANDS[name].sections} <= {field.name for field in dataclasses.fields(Config)}


def test_the_chain_keeps_the_order_of_the_registry() -> None:
    order = [name for name in COMMANDS if COMMANDS[name] in CHAIN and name not in ("eval", "export")]
    assert order == [command.name for command in CHAIN if command.name not in ("eval", "export")]
    assert [command.name for command in CHAIN][-4:] == ["export", "eval", "speed", "report"]


def test_the_registry_is_light() -> None:
    """--help reads it: neither torch nor Hydra nor numpy is loaded."""
    heavy = ("torch", "megatron", "transformers", "hydra", "omegaconf", "numpy", "pyarrow", "datasets", "lm_eval")
    code = f"import sys; import minitron_train.commands.help; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_adding_a_command_takes_one_file_and_one_line() -> None:
    """Outside its own file, and outside commands that build on it, a command is named in registry.py alone."""
    for name, users in {"plan": {"registry"}, "search": {"registry"}, "run": {"registry"}}.items():
        found = set()
        for file in FOLDER.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "minitron_train.commands":
                    found |= {file.stem for alias in node.names if alias.name == name}
        assert found == users
