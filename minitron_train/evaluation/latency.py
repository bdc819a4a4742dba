"""Decode latency of candidate shapes: measured with random weights, kept in search/latency.json, one value per shape."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

from minitron_train.arch import Shape
from minitron_train.config import Config
from minitron_train.evaluation.speed import Machine, machine_here
from minitron_train.hf import student_config
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_json
from minitron_train.runtime.records import Count, read_record

if TYPE_CHECKING:
    import torch

Milliseconds = Annotated[float, Meta(gt=0, le=1e12)]


class Conditions(TypedDict):
    """What a latency depends on besides the shape's sizes."""

    machine: Machine
    family: str  # hash of the teacher's config.json
    batch_size: Count
    context: Count
    new_tokens: Count
    turns: Count


class Latencies(TypedDict):
    """latency.json."""

    conditions: Conditions
    latency_ms: dict[str, Milliseconds]  # by the name of the candidate


def read_latencies(file: Path) -> Latencies | None:
    """Read latency.json; None if nothing was measured.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_record(file, Latencies, "remove it and run `search` again")
    except FileNotFoundError:
        return None


def known_latencies(file: Path, names: list[str]) -> dict[str, float]:
    """Return the latencies that an earlier search measured, so that all jobs of an array use the same ones.

    Raises:
        UserError: the file is missing or damaged, or a shape is not in it.
    """
    found = read_latencies(file)
    missing = [name for name in names if found is None or name not in found["latency_ms"]]
    if found is None or missing:
        raise UserError(
            f"{file}: holds no latency of {missing[0]}, and an array's jobs must use the same ones; "
            "measure first: run `search` with search.evaluate=false and search.retrain_tokens=0"
        )
    return {name: found["latency_ms"][name] for name in names}


def measure_latencies(
    file: Path,
    teacher: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    config: Config,
    dtype: "torch.dtype",
    device: "torch.device",
) -> dict[str, float]:
    """Measure the shapes that `file` does not hold yet. Each value is stored as soon as it is measured.

    A value is the median over speed.turns, in milliseconds, of a forward pass of one new token for each of
    search.batch_size sequences, after search.context tokens. Values of another machine are used only if they are
    complete, so that all jobs of a search have the same ones; config.force measures again.

    Args:
        teacher: contents of its config.json.
        shapes: name -> shape.
    """
    now, before = conditions(teacher, config, dtype, device), read_latencies(file)
    found: dict[str, float] = {}
    if before and before["conditions"] | {"machine": now["machine"]} == now and not config.force:
        is_here = before["conditions"]["machine"] == now["machine"]
        is_complete = shapes.keys() <= before["latency_ms"].keys()
        found = dict(before["latency_ms"]) if is_here or is_complete else {}
        now = before["conditions"] if found else now
    missing = [name for name in shapes if name not in found]
    for number, name in enumerate(missing, start=1):
        found[name] = latency_ms(student_config(teacher, shapes[name]), shapes[name], config, dtype, device)
        say(f"search: {name} takes {found[name]:.3g} ms per token ({number} of {len(missing)})")
        atomic_write_json(file, {"conditions": now, "latency_ms": found})
    machine = now["machine"]
    say(f"search: latencies of {machine['device']}, {machine['threads']} threads, {machine['dtype']} in {file}")
    return {name: found[name] for name in shapes}


def conditions(teacher: Mapping[str, Any], config: Config, dtype: "torch.dtype", device: "torch.device") -> Conditions:
    """Return the conditions of a measurement in this process."""
    return {
        "machine": machine_here(device, dtype),
        "family": hashlib.sha256(json.dumps(teacher, sort_keys=True).encode()).hexdigest(),
        "batch_size": config.search.batch_size,
        "context": config.search.context,
        "new_tokens": config.speed.new_tokens,
        "turns": config.speed.turns,
    }


def latency_ms(
    student: Mapping[str, Any], shape: Shape, config: Config, dtype: "torch.dtype", device: "torch.device"
) -> float:
    """Measure one shape; `student` is the contents of its config.json."""
    import torch

    from minitron_train.evaluation import timing

    model = timing.random_model(student, dtype, device)
    token_B1 = torch.zeros(config.search.batch_size, 1, dtype=torch.int64, device=device)
    seconds = []
    for turn in range(config.speed.turns + 1):
        cache = timing.filled_cache(model, shape, config.search.batch_size, config.search.context)
        passed_s = timing.time_decoding(model, token_B1, cache, config.speed.new_tokens)
        if turn:  # the first one warms up
            seconds.append(passed_s)
    return 1e3 * median(seconds) / config.speed.new_tokens
