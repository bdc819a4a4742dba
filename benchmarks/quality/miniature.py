"""Shared by the benchmarks on recipe `miniature`: runs the real commands in cached folders and reads a run's metrics.

A Nemotron teacher of 5.4 M parameters is trained, then cut to 28 % of them. The text is MINITRON_DATA's corpora if that is
set, otherwise the embedded corpus. --folder defaults to minitron_train/token_efficiency in $XDG_CACHE_HOME (or ~/.cache).
In it, each combination of recipe settings, pretraining tokens and text has its own folder, so that a cached teacher is
never used for different settings.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from minitron_train.commands.configuration import compose
from minitron_train.stages import plain

ROOT = Path(__file__).parents[2]
RECIPE = yaml.safe_load((ROOT / "recipes" / "miniature.yaml").read_text())
PRETRAIN_TOKENS, QUICK_TOKENS = RECIPE["pretrain"]["num_tokens"], 40_960


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One evaluation during training: tokens, held-out cross-entropy, and KL from the teacher, both in nats."""

    name: str
    tokens: int
    loss: float
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Miniature:
    """Runs the recipe's commands in one folder; `quick` makes everything small."""

    folder: Path
    quick: bool
    pretrain_tokens: int = PRETRAIN_TOKENS

    def command(self, command: str, name: str, *overrides: str, quiet: bool = False) -> Path:
        """Run one command of the recipe in folder/NAME; the command itself skips finished work."""
        target = self.folder / name
        words = [sys.executable, "-W", "ignore", "-m", "minitron_train", command, "+recipe=miniature"]
        words += [f"output_dir={target}", "tracking.wandb.mode=disabled", *self.data(), *overrides]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL if quiet else None)
        return target

    def data(self) -> list[str]:
        """Overrides that select the text, and the amounts of --quick."""
        corpus = os.environ.get("MINITRON_DATA")
        found = [f"data.path='{corpus}/corpus/[!v]*.jsonl.gz'"] if corpus else []  # all but valid_wikitext2
        if self.quick:
            found += ["data.validation_tokens=4096", "calibration.num_samples=64", "train.warmup_steps=2"]
        return found

    def pretrained(self, name: str, *overrides: str) -> Path:
        """folder/NAME after `pretrain`, with the model in its `teacher`; a finished folder is reused."""
        target = self.folder / name
        if (target / "teacher").exists():
            return target
        return self.command("pretrain", name, f"pretrain.num_tokens={self.pretrain_tokens}", *overrides)


def arguments(text: str | None) -> argparse.ArgumentParser:
    """The common options of the benchmarks; `text` is the benchmark's docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the docs have other figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    amount = f"training tokens of the teacher and of the small model from scratch, without --quick; default: {PRETRAIN_TOKENS:,}"
    parser.add_argument("--pretrain-tokens", type=int, metavar="N", default=PRETRAIN_TOKENS, help=amount)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser.add_argument("--folder", type=Path, metavar="DIR", default=cache / "minitron_train" / "token_efficiency")
    return parser


def open_recipe(asked: argparse.Namespace) -> Miniature:
    """The recipe in the requested folder, in a subfolder for its settings and its text."""
    tokens = QUICK_TOKENS if asked.quick else asked.pretrain_tokens
    settings = plain(asdict(compose(["+recipe=miniature"])))
    content = short_hash([settings, tokens, os.environ.get("MINITRON_DATA")])
    return Miniature(asked.folder.absolute() / f"{tokens}-tokens-{content}", asked.quick, tokens)


def short_hash(value: Any) -> str:
    """Hash of a JSON-able value, for file names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def evaluations(folder: Path, name: str) -> list[Run]:
    """The evaluations on held-out text in a training run's metrics, by increasing tokens."""
    rows = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    key = "eval.validation."
    return [
        Run(name=name, tokens=row["tokens"], loss=row[f"{key}loss"], kl=row.get(f"{key}kl"))
        for row in rows
        if f"{key}loss" in row
    ]
