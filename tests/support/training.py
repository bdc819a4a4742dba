"""A tiny student, teacher and corpus, and training runs on them."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.config import Config, TrainConfig, WandbMode
from minitron_train.runtime.launch import read_world
from tests.support.models import save_tiny

SEQ_LENGTH, ROWS, NUM_STEPS = 32, 8, 8
VOCAB = 320


@dataclass(frozen=True)
class Material:
    """Hugging Face folders with a tokenizer, and text."""

    student: Path
    teacher: Path
    corpus: Path


def make_material(root: Path, family: str = "nemotron") -> Material:
    """A random teacher, a narrower and shallower random student, the standard library's docstrings."""
    import argparse
    import textwrap

    from minitron_train.data import tokenizers

    corpus = root / "corpus.txt"
    corpus.write_text("\n\n".join(Path(module.__file__).read_text() for module in (argparse, textwrap, json)))
    tokenizer = tokenizers.train_bpe(iter([corpus.read_text()]), VOCAB)
    for name in ("student", "teacher"):
        tokenizers.save(tokenizer, root / name)
    save_tiny(family, root / "teacher", vocab_size=VOCAB, num_hidden_layers=3)
    save_tiny(
        family, root / "student", seed=1, vocab_size=VOCAB, num_hidden_layers=2, hidden_size=48, initializer_range=0.05
    )
    return Material(root / "student", root / "teacher", corpus)


def make_config(material: Material, **overrides: Any) -> Config:
    """Eight steps of eight sequences in micro-batches of two; an override like train__lr=1.0 sets train.lr."""
    config = Config(name="test")
    config.data.path, config.data.num_workers, config.data.validation_tokens = str(material.corpus), 0, 8 * SEQ_LENGTH
    config.train = TrainConfig(
        num_tokens=NUM_STEPS * ROWS * SEQ_LENGTH,
        global_batch_size=ROWS,
        micro_batch_size=2,
        seq_length=SEQ_LENGTH,
        lr=3e-3,
        min_lr=1e-4,
        warmup_steps=2,
    )
    config.checkpoint.interval_steps = 3
    config.tracking.wandb.mode = WandbMode.disabled
    for key, value in overrides.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


def run(material: Material, folder: Path, *, alone: bool = False, **overrides: Any) -> dict[str, Any]:
    """Train in this process, with process groups of its own; `alone` trains without a teacher."""
    from minitron_train.parallel.groups import start
    from minitron_train.train.run import train

    config = make_config(material, **overrides)
    with start(config.parallel, read_world(), config.seed) as groups:
        teacher = None if alone else material.teacher
        return train(config, groups, student=material.student, teacher=teacher, folder=folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without the columns that depend on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("tokens_per_second", "gemm_utilisation", "mfu", "data_seconds", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in machine} for line in lines]


class Interrupted(Exception):
    """Raised in the middle of a run by `interrupt`."""


@contextlib.contextmanager
def before_step(number: int, action: Any) -> Iterator[None]:
    """Call `action(trainer)` after the backward pass of step `number`, before the optimizer step."""
    from minitron_train.train.loop import Trainer

    original = Trainer.forward_backward

    def wrapped(self: Trainer, batch: Any) -> Any:
        row = original(self, batch)
        if self.state.step + 1 == number:
            action(self)
        return row

    Trainer.forward_backward = wrapped
    try:
        yield
    finally:
        Trainer.forward_backward = original


def interrupt(trainer: Any) -> None:
    """An action for `before_step`: wait until pending checkpoints are on disk, then raise Interrupted."""
    trainer.checkpoints.poll(wait=True)
    raise Interrupted
