"""Size, memory and tokens per second of several models, measured in turn in one process, and their record speed.json."""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, TypedDict, TypeVar

from msgspec import Meta

from minitron_train.config import SpeedConfig
from minitron_train.hf import folder_shape, weight_bytes
from minitron_train.runtime.records import Count, damaged, read_record

if TYPE_CHECKING:
    import torch

    from minitron_train.evaluation.timing import Pass

WARM_UP_TOKENS = 2
T = TypeVar("T")
Rate = Annotated[float, Meta(gt=0, le=1e15)]


class Spread(TypedDict):
    """Tokens per second over the turns."""

    median: Rate
    lowest: Rate
    highest: Rate


class BatchSpeed(TypedDict):
    """One model at one batch size. Bytes are those in memory; the cache is full, at the end of the last token."""

    cache_bytes: Count
    prefill: Spread
    decode: Spread


class ModelSpeed(TypedDict):
    """One model. The keys of `batches` are batch sizes."""

    file_bytes: Count
    weight_bytes: Count
    batches: dict[str, BatchSpeed]


class Machine(TypedDict):
    """What a measurement depends on besides the models."""

    device: str
    threads: Count
    dtype: str
    versions: dict[str, str]


class Speed(TypedDict):
    """speed.json."""

    machine: Machine
    prompt_tokens: Count
    new_tokens: Count
    turns: Count
    models: dict[str, ModelSpeed]  # by label


@dataclass(frozen=True, slots=True)
class Measured:
    """One model that is being timed: what it is, and its passes by batch size, one for each turn."""

    file_bytes: int
    weight_bytes: int
    passes: dict[int, list["Pass"]]


def read_speed(file: Path) -> Speed | None:
    """Read speed.json; None if speed was not measured.

    Raises:
        UserError: the file is damaged.
    """
    remedy = "run `speed` again with force=true"
    try:
        speed = read_record(file, Speed, remedy)
    except FileNotFoundError:
        return None
    sizes = {tuple(model["batches"]) for model in speed["models"].values()}
    if len(sizes) != 1 or () in sizes:
        raise damaged(str(file), "it has no models, or their batch sizes differ", remedy)
    return speed


def machine_here(device: "torch.device", dtype: "torch.dtype") -> Machine:
    """Describe this process: processor or GPU, threads, dtype, versions."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers")},
        },
    }


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(
    folders: Mapping[str, Path], settings: SpeedConfig, dtype: "torch.dtype", device: "torch.device", seed: int
) -> Speed:
    """Time all models with the same prompts, dtype and threads. All of them are in memory at once.

    Each turn times every model at every batch size and begins with another model, so that other work on the machine
    slows all of them alike. A few tokens of every model come before the first turn and do not count.

    Args:
        folders: label -> Hugging Face folder.
        seed: draws the prompts, uniformly from the smallest vocabulary.

    Raises:
        UserError: transformers does not open a model, or its context is shorter than the new tokens.
    """
    import torch

    from minitron_train.evaluation import timing

    shapes = {label: folder_shape(folder) for label, folder in folders.items()}
    prompt_tokens = settings.prompt_tokens
    for label, shape in shapes.items():
        shape.check_length(settings.new_tokens + 1, "speed.new_tokens + 1", label)
        prompt_tokens = min(prompt_tokens, shape.max_position_embeddings - settings.new_tokens)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(shape.vocab_size for shape in shapes.values())
    prompts = {
        size: torch.randint(vocabulary, (size, prompt_tokens), generator=generator).to(device)
        for size in settings.batch_sizes
    }
    models = {label: timing.open_model(folder, dtype, device) for label, folder in folders.items()}
    found = {
        label: Measured(weight_bytes(folders[label]), timing.weight_bytes(model), {size: [] for size in prompts})
        for label, model in models.items()
    }
    for model, size in product(models.values(), prompts):
        timing.time_generation(model, prompts[size][:, :WARM_UP_TOKENS], WARM_UP_TOKENS)
    for turn, size in product(range(settings.turns), prompts):
        for label in rotated(list(models), turn):
            passes = timing.time_generation(models[label], prompts[size], settings.new_tokens)
            found[label].passes[size].append(passes)
    return {
        "machine": machine_here(device, dtype),
        "prompt_tokens": prompt_tokens,
        "new_tokens": settings.new_tokens,
        "turns": settings.turns,
        "models": {
            label: model_speed(measured, prompt_tokens, settings.new_tokens) for label, measured in found.items()
        },
    }


def rotated(values: list[T], by: int) -> list[T]:
    """Return a list that begins with another of its values."""
    start = by % len(values)
    return values[start:] + values[:start]


def model_speed(measured: Measured, prompt_tokens: int, new_tokens: int) -> ModelSpeed:
    """Turn the seconds of one model into its record."""
    batches: dict[str, BatchSpeed] = {}
    for size, passes in measured.passes.items():
        batches[str(size)] = {
            "cache_bytes": max(one.cache_bytes for one in passes),
            "prefill": spread(size * prompt_tokens / one.prefill_s for one in passes),
            "decode": spread(size * new_tokens / one.decode_s for one in passes),
        }
    return {"file_bytes": measured.file_bytes, "weight_bytes": measured.weight_bytes, "batches": batches}


def spread(rates: Iterable[float]) -> Spread:
    """Return median, lowest and highest."""
    values = list(rates)
    return {"median": median(values), "lowest": min(values), "highest": max(values)}
