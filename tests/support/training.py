"""A tiny student, teacher and corpus, and training runs on them."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_train.config import Config, TrainConfig, WandbMode
from minitron_train.runtime.launch import read_world
from tests.support.models import save_tiny

SEQ_LENGTH, ROWS, NUM_STEPS = 32, 8, 8
VOCAB = 320
LOSSES = ("loss", "grad_norm", "eval.validation.kl", "eval.validation.loss")


@dataclass(frozen=True)
class Material:
    """Hugging Face folders with a tokenizer, and text."""

    student: Path
    teacher: Path
    corpus: Path


def make_material(
    root: Path, family: str = "nemotron", save: Callable[..., Path] = save_tiny, **changes: Any
) -> Material:
    """A random teacher, a narrower and shallower random student, the standard library's docstrings.

    `save` takes the family, a folder and settings (`changes` among them), and writes a random model.
    """
    import argparse
    import textwrap

    from minitron_train.data import tokenizers

    corpus = root / "corpus.txt"
    corpus.write_text("\n\n".join(Path(module.__file__).read_text() for module in (argparse, textwrap, json)))
    tokenizer = tokenizers.train_bpe(iter([corpus.read_text()]), VOCAB)
    for name in ("student", "teacher"):
        tokenizers.save(tokenizer, root / name)
    changes = {"vocab_size": VOCAB, **changes}
    narrower: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 48, "initializer_range": 0.05}
    if save is not save_tiny:  # some families' heads must fill the hidden size
        narrower |= {"hidden_size": 32, "num_attention_heads": 4}
    save(family, root / "teacher", **changes, num_hidden_layers=3)
    save(family, root / "student", seed=1, **changes, **narrower)
    return Material(root / "student", root / "teacher", corpus)


def make_config(material: Material, **overrides: Any) -> Config:
    """Eight steps of eight sequences in micro-batches of two; an override like train__lr=1.0 sets train.lr."""
    config = Config(name="test")
    config.data.path, config.data.num_workers, config.data.validation_tokens = str(material.corpus), 0, 8 * SEQ_LENGTH
    config.data.validation_fraction = 0.2  # each Python has other text, and 5 % of its 30 passages may be none
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


def teach(material: Material, folder: Path, **overrides: Any) -> dict[str, Any]:
    """Write a teacher cache in this process, with process groups of its own."""
    from minitron_train.parallel.groups import start
    from minitron_train.train.teach import teach as write_cache

    config = make_config(material, **overrides)
    with start(config.parallel, read_world(), config.seed) as groups:
        return write_cache(config, groups, teacher=material.teacher, folder=folder)


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


def train_here(rank: int, world_size: int, runs: list[tuple[Material, Path, dict[str, Any]]]) -> None:
    """Several runs in the same processes, one after the other; `stop_in` breaks a run off in that step."""
    for number, (material, folder, settings) in enumerate(runs):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 7 * number)
        settings = dict(settings)
        stop_in = settings.pop("stop_in", 0)
        with before_step(stop_in, interrupt):
            try:
                run(material, folder, **settings)
            except Interrupted:
                assert stop_in


def differences(folder: Path, wanted: list[dict[str, Any]]) -> dict[str, float]:
    """Largest distance of each logged value from another run's, step by step."""
    found = rows(folder)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    pairs = [
        (key, row[key], other[key]) for row, other in zip(found, wanted, strict=True) for key in LOSSES if key in row
    ]
    return {
        name: max(abs(value - other) for key, value, other in pairs if key == name)
        for name in {key for key, *_ in pairs}
    }


def assert_equal(folder: Path, wanted: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    """Every logged value is within `tolerance` (relative to the wanted one)."""
    for name, distance in differences(folder, wanted).items():
        scale = max(abs(row[name]) for row in wanted if name in row)
        assert distance < tolerance * max(1.0, scale), (folder.name, name, distance)


def student_of(folder: Path, target: Path) -> dict[str, Any]:
    """The exported weights."""
    from minitron_train.hf import HFFolder
    from minitron_train.train.export import export_checkpoint, find_checkpoint

    target.mkdir()
    export_checkpoint(find_checkpoint(folder, folder, trust_external=True), target)
    opened = HFFolder(target)
    return {name: opened.read(name) for name in opened.sizes}


def former_state(self: Any, model: dict[str, Any]) -> dict[str, Any]:
    """Optimizer.state_to_save in the format of earlier checkpoints: megatron-core's own."""
    from minitron_train.parallel import cpu

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    with cpu.cuda_means_cpu():
        return {"model": model, "optimizer": self.inner.sharded_state_dict(model, is_loading=False, metadata=metadata)}
