"""The models that benchmarks/quality/pruning_peers.py cuts, and how it calls the program's commands on them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pruning_quality import CACHE, teacher_folder


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is cut. Its name is that of the recipe that sets the training of its students."""

    name: str
    teacher: Callable[[], Path]  # returns its folder; makes it if missing
    targets: tuple[str, ...]
    tokens: int  # default tokens of distillation
    local: bool  # whether MINITRON_DATA's corpora are used
    without: tuple[str, ...] = ()  # methods for Llama only
    rates: tuple[str, ...] = ()  # learning rate of all students, where the recipe states none

    @property
    def corpora(self) -> str | None:
        """Where the text is; None for the embedded corpus."""
        return os.environ.get("MINITRON_DATA") if self.local else None


def tiny_folder() -> Path:
    """Recipe `tiny`'s teacher in this user's cache, pretrained once."""
    folder = CACHE / "tiny"
    if not (folder / "teacher").exists():
        program("tiny", folder, "pretrain")
    return folder / "teacher"


SMOLLM2_RATES = ("train.lr=3e-4", "train.min_lr=3e-5", "train.warmup_steps=5")
SUBJECTS = (
    Subject("smollm2", teacher_folder, ("432/1024/6", "504/1024/6"), 50_176, local=True, rates=SMOLLM2_RATES),
    Subject("tiny", tiny_folder, ("192/640/4",), 98_304, local=False, without=("slicegpt-like", "nvidia-modelopt")),
)


def program(recipe: str, output: Path, command: str, *overrides: str) -> None:
    """Run one command of the program; finished stages in `output` are skipped."""
    words = [sys.executable, "-W", "ignore", "-m", "minitron_train", command, f"+recipe={recipe}"]
    subprocess.run([*words, f"output_dir={output}", "tracking.wandb.mode=disabled", *overrides], check=True)
