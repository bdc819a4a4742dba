"""The measured size, memory and speed of the models: one table for the report, the model card and the summary."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minitron_train.evaluation.speed import BatchSpeed, ModelSpeed, Speed, Spread
from minitron_train.reporting.load import MODELS, Run
from minitron_train.runtime.files import byte_size

NOT_MEASURED = "–"


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity: its name, a text for each model, and the student's value divided by the teacher's."""

    name: str
    cells: list[str]
    ratio: str


@dataclass(frozen=True, slots=True)
class Quantity:
    """How one quantity is read from a model's record, and formatted."""

    name: str
    value: Callable[[ModelSpeed], float]
    text: Callable[[ModelSpeed], str]


def labels(speed: Speed) -> list[str]:
    """Return the measured models: teacher, pruned, student."""
    return [label for label in MODELS if label in speed["models"]]


def speed_rows(run: Run) -> list[Row]:
    """Return one row per quantity; empty if speed was not measured."""
    if run.speed is None:
        return []
    models = [run.speed["models"][label] for label in labels(run.speed)]
    return [
        Row(quantity.name, [quantity.text(model) for model in models], ratio(run.speed, quantity))
        for quantity in quantities(run.speed)
    ]


def quantities(speed: Speed) -> Iterator[Quantity]:
    """Yield what is shown of each model: bytes, then the rates by batch size."""
    yield Quantity("weight files", lambda model: model["file_bytes"], lambda model: byte_size(model["file_bytes"]))
    for size in next(iter(speed["models"].values()))["batches"]:
        of = "1 sequence" if size == "1" else f"{size} sequences"
        yield memory(f"memory of weights and cache, {of}", size)
        yield rate(f"prefill tokens/s, {of}", lambda model, size=size: model["batches"][size]["prefill"])
        yield rate(f"decode tokens/s, {of}", lambda model, size=size: model["batches"][size]["decode"])


def memory(name: str, size: str) -> Quantity:
    """Bytes of the weights and of a full cache."""

    def num_bytes(model: ModelSpeed) -> int:
        batch: BatchSpeed = model["batches"][size]
        return model["weight_bytes"] + batch["cache_bytes"]

    return Quantity(name, num_bytes, lambda model: byte_size(num_bytes(model)))


def rate(name: str, read: Callable[[ModelSpeed], Spread]) -> Quantity:
    """Tokens per second."""
    return Quantity(name, lambda model: read(model)["median"], lambda model: spread_text(read(model)))


def spread_text(spread: Spread) -> str:
    """Format a rate as "358 (301–362)": the median over the turns, the lowest and the highest."""
    return f"{rate_text(spread['median'])} ({rate_text(spread['lowest'])}–{rate_text(spread['highest'])})"


def rate_text(value: float) -> str:
    """Format a rate with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(speed: Speed, quantity: Quantity) -> str:
    """Format the student's (or the pruned model's) value divided by the teacher's."""
    models = speed["models"]
    small = models.get("student") or models.get("pruned")
    if small is None or "teacher" not in models:
        return NOT_MEASURED
    return f"{quantity.value(small) / quantity.value(models['teacher']):.2f}"


def conditions(run: Run) -> str:
    """Return the sentence about machine, dtype, versions and lengths; empty if speed was not measured."""
    if run.speed is None:
        return ""
    machine, turns = run.speed["machine"], run.speed["turns"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Speed: {machine['device']}, {threads}, {machine['dtype']}, {versions}; prompts of {run.speed['prompt_tokens']} "
        f"tokens, {run.speed['new_tokens']} new tokens; median of {turns} turns (lowest–highest)."
    )


def speed_table(run: Run) -> list[list[str]]:
    """Return heads and rows of the summary's table; empty if speed was not measured."""
    if run.speed is None:
        return []
    heads = ["", *labels(run.speed), "student / teacher"]
    return [heads, *([row.name, *row.cells, row.ratio] for row in speed_rows(run))]
