"""SIGKILL at random moments and at file operations: the short forms of benchmarks/faults/kill_resume.py and kill_files.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(script: str, *words: str, figures: Path) -> Any:
    """What a benchmark writes with --json."""
    command = [sys.executable, "-W", "ignore", f"benchmarks/faults/{script}", *words, "--json", str(figures)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(figures.read_text())


@pytest.mark.races
def test_every_kill_is_survived_bit_for_bit(tmp_path: Path) -> None:
    found = benchmark("kill_resume.py", "--kills", "5", figures=tmp_path / "figures.json")
    assert (found["kills"], found["resumed"], found["bit_equal"]) == (5, 5, 5)


@pytest.mark.races
def test_a_rerun_after_a_kill_at_a_file_operation_gives_the_untouched_folder(tmp_path: Path) -> None:
    """Names, and bytes of what is not a time; the whole sweep is the benchmark's."""
    stages, kills = ("prune again", "distill", "export", "eval again"), 1  # of each stage
    words = ("--sample", str(kills), "--stages", *stages)
    found = benchmark("kill_files.py", *words, figures=tmp_path / "figures.json")
    counts = {name: (outcome["killed"], outcome["equal"]) for name, outcome in found.items()}
    assert counts == dict.fromkeys(stages, (kills, kills)), found
