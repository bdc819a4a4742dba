"""The plan's memory beside what scoring, slicing and distilling recipe `tiny` really take, each in a fresh process.

A short form of benchmarks/plan/plan_check.py; times are not asserted here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_memory_is_within_a_tenth(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/plan/plan_check.py", "--quick", "--repeats", "0", "--only", "tiny TP 1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(figures)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["case"]: row for row in json.loads(figures.read_text())["cases"]}
    assert sorted(found) == ["distill tiny TP 1", "score tiny TP 1", "slice tiny TP 1"]
    for name, row in found.items():
        assert row["memory_error"] < 0.1, (
            f"{name}: {row['planned_bytes']:,} planned, {row['measured_bytes']:,} measured"
        )
