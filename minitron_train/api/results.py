"""What the functions of the library return."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from minitron_train.evaluation.speed import Machine, ModelSpeed


@dataclass(frozen=True, slots=True)
class Scored:
    """What `score` measured."""

    folder: Path
    num_sequences: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned Hugging Face folder."""

    folder: Path
    parameters: int  # tied weights count once
    teacher_parameters: int

    @property
    def kept(self) -> "dict[str, Tensor]":
        """Kept indices by axis: `layers`, `embedding` (or its basis), `layers.{i}.heads`, `layers.{i}.ffn`, …

        The keys that begin with `importance.` hold the scores that the choice used.
        """
        from safetensors.torch import load_file

        return load_file(self.folder / "kept.safetensors")


@dataclass(frozen=True, slots=True)
class Taught:
    """A finished teacher cache, which `distill` reads with settings={"teacher.cache": taught.folder}."""

    folder: Path
    num_tokens: int
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Distilled:
    """A finished training; `export` makes a Hugging Face folder of it."""

    folder: Path  # checkpoints/ and metrics.jsonl
    num_steps: int
    num_tokens: int
    evaluation: dict[str, float]  # the last one: validation.kl, validation.loss, …

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, one for every logged step."""
        from minitron_train.train.metrics import read_rows

        return read_rows(self.folder / "metrics.jsonl").values


@dataclass(frozen=True, slots=True)
class Exported:
    """A student as a Hugging Face folder."""

    folder: Path
    parameters: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What `evaluate` measured; `perplexity` is None where it overflowed."""

    perplexity: float | None
    results: dict[str, Any]  # task -> metric -> value
    file: Path


@dataclass(frozen=True, slots=True)
class Timed:
    """What `speed` measured: speed/speed.json."""

    models: "dict[str, ModelSpeed]"  # teacher, pruned, student: bytes, and tokens per second by batch size
    machine: "Machine"
    file: Path


@dataclass(frozen=True, slots=True)
class Planned:
    """What a recipe costs; str() is the table of the command line."""

    details: dict[str, Any]

    def __str__(self) -> str:
        from minitron_train.planning import format_plan

        return format_plan(self.details)
