"""docs/scale.md prints the plan's figures: they must be those that the program prints today."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest

from minitron_train.planning import format_plan, make_plan
from minitron_train.planning.show import layout_text
from tests.unit.test_plan import load, shapes

ROOT = Path(__file__).parents[2]
SCALE = (ROOT / "docs" / "scale.md").read_text()
ROW = re.compile(r"\| (\w+), (\d+) (A100|H100).*? \| (TP \d+, DP \d+) \| (\S+) GiB" + r" \| (\S+)" * 4 + r" \|")
SENTENCES = (
    "The teacher alone is {small.memory.teacher_weights:.1f} GiB in bf16",
    "{small.memory.optimizer:.1f} GiB per GPU for `4b`",
    "gradients are another {small.memory.gradients:.1f} GiB",
    "activations of {usual.kept.without_recompute:.2f} GiB become {usual.kept.with_recompute:.2f}",
    "A `4b` step on A100s takes {usual.step.total:.1f} s: matrix products {usual.step.matrices:.1f} s, the fused "
    "loss {usual.step.loss:.1f} s, passes over memory {usual.step.elementwise:.1f} s",
    "forward pass: {usual.flops.teacher_forward_per_token:.2e} per token against "
    "{usual.flops.student_training_per_token:.2e} for the student's",
    "the cheaper teacher ({cheap.flops.teacher_forward_per_token:.2e}): {cheap.hours:.1f} hours instead of {usual.hours:.1f}",
    "{large.step.tp_network:.2f} s of {large.step.total:.2f} on A100s, {fast.step.tp_network:.2f} s of {fast.step.total:.2f} on",
    "{usual.disk.checkpoint:.1f} GiB each for `4b`, {sibling.disk.checkpoint:.1f} for `8b`",
    "need {usual.disk.total:.0f} GiB of disk",
    "{usual.network.tensor_parallel:.0f} GiB for TP 2 inside the node, {usual.network.data_parallel:.1f} GiB for DP",
    "gives {usual.teacher_cache.saved_hours:.1f} of the {usual.hours:.1f} hours to the teacher's forward pass",
    "memory falls from {usual.memory.total:.1f} to {cached.memory.total:.1f} GiB per GPU",
    "({usual.scoring.resident:.1f} GiB) or streamed ({usual.scoring.streamed:.1f} GiB)",
    "reads {usual.slicing.read_bytes:.1f} GiB, writes {usual.slicing.written_bytes:.1f}",
)


@functools.cache
def planned(recipe: str, *overrides: str) -> dict[str, Any]:
    """What `plan` reckons."""
    config = load(f"+recipe={recipe}", *overrides)
    return make_plan(config, *shapes(config))


def test_the_page_shows_the_plan() -> None:
    shown = re.search(r"^plan 4b$.*?(?=^```)", SCALE, flags=re.MULTILINE | re.DOTALL)
    assert shown and format_plan(planned("4b")).startswith(shown[0].rstrip())


@pytest.mark.parametrize("row", ROW.findall(SCALE), ids=" ".join)
def test_the_table_of_scale(row: tuple[str, ...]) -> None:
    recipe, gpus, cluster, layout, *numbers = row
    result = planned(recipe, f"cluster={cluster.lower()}", f"cluster.num_nodes={int(gpus) // 8}")["recommended"]
    assert layout == f"TP {result['layout']['tp']}, DP {result['layout']['dp']}"
    peak_gib, step_s = result["memory_bytes"]["total"] / 2**30, result["step_seconds"]["total"]
    for text, value in zip(
        numbers, (peak_gib, step_s, result["tokens_per_second"], result["hours"], result["gpu_hours"]), strict=True
    ):
        decimals = len(text.partition(".")[2])
        assert text in {f"{value:,.{decimals}f}", f"{round(value, -2):,.0f}", f"{round(value, -3):,.0f}"}


STAGED_ROW = re.compile(
    r"\| (70B|340B), (\d+) H100 \| (TP [^|(]*)(?: \(configured\))? \| (.*?) \| (\S+) \| (.*?) \| (\S+) \|"
)
COMMANDS = re.findall(r"minitron_train plan (model=(?:.|\\\n)*?)\n(?! *(?:model|train|student)\S)", SCALE)


def test_the_table_of_stages() -> None:
    """Every row, from the command of its models above the table."""
    commands = dict(zip(("70B", "340B"), (text.replace("\\", " ").split() for text in COMMANDS[-2:]), strict=True))
    rows = STAGED_ROW.findall(SCALE)
    assert len(rows) == 8
    for models, gpus, layout, peaks, seconds, bubble, gpu_hours in rows:
        pp = re.search(r"PP (\d+)", layout)
        stages = int(pp[1]) if pp and models == "70B" else 1  # configured
        words = [word for word in commands[models] if "num_nodes" not in word]
        config = load(*words, f"cluster.num_nodes={int(gpus) // 8}", f"parallel.pipeline_model_parallel_size={stages}")
        found = make_plan(config, *shapes(config))["recommended"]
        step = found["step_seconds"]
        passes = sum(step[name] for name in ("matrices", "elementwise", "loss", "tp_network", "bubble"))
        assert layout_text(found["layout"]).startswith(f"{layout}, micro-batch 1")
        assert peaks == ", ".join(f"{size / 2**30:.1f}" for size in found["bytes_of_stages"])
        assert seconds == f"{step['total']:.1f}" and gpu_hours == f"{round(found['gpu_hours'], -2):,.0f}"
        assert bubble == (f"{step['bubble'] / passes:.1%}".replace("%", " %") if "PP" in layout else "0")


class Figures:
    """A nested dictionary with dots, bytes as GiB."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Any:
        value = self.values[name]
        if isinstance(value, dict):
            return Figures(value)
        return value / 2**30 if isinstance(value, int) and value > 2**28 and "per_token" not in name else value


def test_the_text_of_scale() -> None:
    runs = {
        "small": planned("4b", "cluster.num_nodes=1"),
        "usual": planned("4b"),
        "large": planned("4b", "cluster.num_nodes=128"),
        "fast": planned("4b", "cluster=h100", "cluster.num_nodes=128"),
        "cheap": planned("4b_from_8b", "cluster=a100"),
        "sibling": planned("8b"),
        "cached": planned("4b", "teacher.cache=x"),
    }
    text = " ".join(SCALE.replace("e10", "e+10").split())
    figures = {name: Figures(result | flat(result)) for name, result in runs.items()}
    assert [sentence for sentence in SENTENCES if sentence.format(**figures) not in text] == []


def flat(result: dict[str, Any]) -> dict[str, Any]:
    """Short names for what the sentences speak of."""
    chosen, scoring = result["recommended"], result["scoring"]["memory_bytes"]
    return {
        "memory": chosen["memory_bytes"],
        "kept": chosen["activations_bytes"],
        "step": chosen["step_seconds"],
        "hours": chosen["hours"],
        "network": {name: int(value) for name, value in chosen["network_bytes_per_step"].items()},
        "scoring": {name: parts["total"] for name, parts in scoring.items()},
    }
