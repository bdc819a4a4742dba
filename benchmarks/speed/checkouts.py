"""Runs a command of this and of another checkout in turn, each in its own process, and compares the seconds of the stage."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A checkout, and its command line with the precision."""

    checkout: Path
    arguments: list[str]

    def seconds(self, record: str) -> float:
        """`wall_seconds` of the provenance `record`, a path in the output folder; this includes loading of the model."""
        with tempfile.TemporaryDirectory(prefix="checkout-") as folder:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "minitron_train",
                *self.arguments,
                f"output_dir={folder}/out",
            ]
            command.append(f"data.cache_dir={folder}/cache")  # checkouts differ in the format of its files
            environment = {**os.environ, "PYTHONPATH": str(self.checkout)}
            done = subprocess.run(command, cwd=self.checkout, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)} in {self.checkout}:\n{done.stderr[-2000:]}"
            return json.loads((Path(folder) / "out" / record).read_text())["wall_seconds"]


def against_baseline(baseline: Path, arguments: list[str], key: str, record: str, rounds: int) -> dict[str, Any]:
    """Seconds of the stage in fp32 in the checkout `baseline`, and here in fp32 and bf16; the three take turns.

    Args:
        arguments: the command without its precision and output folder.
        key: the setting of the precision, such as eval.precision.

    Returns:
        Medians of the seconds, and the median over the rounds of the baseline's seconds by ours.
    """
    fp32, bf16 = ([*arguments, f"{key}={precision}"] for precision in ("fp32", "bf16"))
    contestants = {"baseline": Contestant(baseline.resolve(), fp32)}
    contestants |= {"fp32": Contestant(HERE, fp32), "bf16": Contestant(HERE, bf16)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants.items())
        for name, contestant in order if number % 2 == 0 else order[::-1]:
            seconds[name].append(contestant.seconds(record))
        print({name: round(taken[-1], 2) for name, taken in seconds.items()}, file=sys.stderr, flush=True)
    figures: dict[str, Any] = {f"stage_seconds_{name}": median(taken) for name, taken in seconds.items()}
    for name in ("fp32", "bf16"):
        ratios = [theirs / ours for theirs, ours in zip(seconds["baseline"], seconds[name], strict=True)]
        figures[f"{name}_speedup_vs_baseline"] = median(ratios)
    return figures
