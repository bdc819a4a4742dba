"""A kill in the middle of slicing: nothing is accepted as finished, and a rerun gives what an undisturbed run gives."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from minitron_train.runtime.files import PARTIAL
from tests.support.pruning import random_tokens

KILL_AT = """
import os, signal, sys
from minitron_train.commands import cli
from minitron_train.runtime.launch import World
from minitron_train.pruning import slice

copy, done = slice.copy_block, []

def copy_or_die(*arguments):
    copy(*arguments)
    done.append(1)
    if len(done) == {blocks}:
        os.kill(os.getpid(), signal.SIGKILL)

slice.copy_block = copy_or_die
cli.run(sys.argv, World())
"""


def prune(folder: Path, teacher: Path, *words: str, kill_after_blocks: int = 0) -> subprocess.CompletedProcess[str]:
    """The command, killed after so many blocks (0: not killed)."""
    settings = ["prune", f"teacher.path={teacher}", f"calibration.tokens_path={folder / 'tokens.safetensors'}", *words]
    settings += ["prune=modelopt", f"output_dir={folder / 'out'}", "student.hidden_size=48"]
    program = ["-c", KILL_AT.format(blocks=kill_after_blocks)] if kill_after_blocks else ["-m", "minitron_train"]
    return subprocess.run([sys.executable, *program, *settings], capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file but the provenance, which names the folder and the time."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "provenance.json"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("undisturbed")
    save_file({"tokens": random_tokens()}, folder / "tokens.safetensors")
    result = prune(folder, tiny_models["llama"])
    assert result.returncode == 0, result.stderr
    return contents(folder / "out" / "pruned")


def test_a_kill_leaves_nothing_and_a_rerun_completes(tmp_path, tiny_models, undisturbed):
    out = tmp_path / "out"
    save_file({"tokens": random_tokens()}, tmp_path / "tokens.safetensors")
    killed = prune(tmp_path, tiny_models["llama"], kill_after_blocks=9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in out.glob("pruned*") if PARTIAL not in path.name] == []
    assert len(list(out.glob(f"pruned{PARTIAL}*"))) == 1, "the kill came while files were being written"

    again = prune(tmp_path, tiny_models["llama"])
    assert again.returncode == 0, again.stderr
    assert "score: already finished" in again.stdout
    assert contents(out / "pruned") == undisturbed
    assert not list(out.glob(f"*{PARTIAL}*"))

    other = prune(tmp_path, tiny_models["llama"], "student.ffn_hidden_size=56", kill_after_blocks=9)
    assert other.returncode == -signal.SIGKILL, other.stderr
    assert contents(out / "pruned") == undisturbed, "the old folder stays until a new one is whole"
    assert json.loads((out / "pruned" / "provenance.json").read_text())["settings"]["student"]["ffn_hidden_size"] == 96
