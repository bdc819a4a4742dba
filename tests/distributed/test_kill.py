"""SIGKILL at random moments, also in the middle of a save: the short form of benchmarks/kill_resume.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_kill_is_survived_bit_for_bit(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-W", "ignore", "benchmarks/kill_resume.py", "--kills", "5", "--json", str(figures)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert (found["kills"], found["resumed"], found["bit_equal"]) == (5, 5, 5)
