"""Student shapes that fit a budget, with their cost (arXiv 2407.14679 §2.3)."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minitron_train.arch.shape import Shape
from minitron_train.config import Budget, Config, SearchConfig
from minitron_train.planning.counts import forward_flops_per_token, parameters
from minitron_train.pruning.target import check_request
from minitron_train.runtime.errors import UserError

INFERENCE_BYTES = 2  # bf16 weights and cached keys and values


@dataclass(slots=True)
class Candidate:
    """One shape and what it costs."""

    shape: Shape
    parameters: int
    non_embedding_parameters: int
    memory_gib: float  # weights and KV cache in inference
    flops_per_token: int  # forward
    latency_ms: float | None = None  # of one decoding step, if it was measured
    zero_shot_loss: float | None = None  # both losses are infinite where the perplexity overflowed
    retrained_loss: float | None = None

    @property
    def name(self) -> str:
        """Name of the candidate's folder."""
        return name_of(self.shape.sizes())

    @property
    def loss(self) -> float:
        """The loss that ranks it: after retraining if it was retrained, else zero-shot."""
        known = [loss for loss in (self.retrained_loss, self.zero_shot_loss) if loss is not None]
        return known[0] if known else math.inf

    def row(self) -> dict[str, Any]:
        """The candidate's entry in search.json."""
        sizes = ["num_layers", "num_attention_heads", "ffn_hidden_size", "hidden_size"]
        sizes += ["num_moe_experts"] if self.shape.num_moe_experts else []
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "shape"}
        finite = {key: None if value == math.inf else value for key, value in values.items()}
        return {"name": self.name, **{size: getattr(self.shape, size) for size in sizes}, **finite}


def name_of(sizes: Mapping[str, int]) -> str:
    """Layers, heads, MLP and hidden size as a name, like l12-a8-f1024-h512; with experts l12-a8-f1024-h512-e64."""
    experts = "-e{num_moe_experts}" if sizes.get("num_moe_experts") else ""
    return f"l{{num_layers}}-a{{num_attention_heads}}-f{{ffn_hidden_size}}-h{{hidden_size}}{experts}".format(**sizes)


def weigh(shape: Shape, search: SearchConfig) -> Candidate:
    """Compute a shape's parameters, memory and FLOPs."""
    counts = parameters(shape)
    cached = sum(
        min(search.context, kind.window or search.context) for kind in shape.layer_kinds
    )  # tokens of all layers
    cache = 2 * cached * shape.axis_size("kv") * search.batch_size
    return Candidate(
        shape,
        counts["parameters"],
        counts["non_embedding_parameters"],
        INFERENCE_BYTES * (counts["parameters"] + cache) / 2**30,
        forward_flops_per_token(shape, search.context),
    )


def grid(search: SearchConfig, teacher: Shape) -> Iterator[dict[str, int]]:
    """Yield the sizes of every shape of the grid, whether or not the teacher can be pruned to them."""
    axes = [
        getattr(search, key) or [getattr(teacher, key)] for key in ("num_layers", "num_attention_heads", "hidden_size")
    ]
    every_number = search.num_moe_experts or [teacher.num_moe_experts]
    for layers, heads, hidden, factor, experts in itertools.product(
        *axes, search.ffn_expansion or [None], every_number
    ):
        ffn = teacher.ffn_hidden_size if factor is None else round(factor * hidden)
        sizes = {"num_layers": layers, "num_attention_heads": heads, "hidden_size": hidden, "ffn_hidden_size": ffn}
        yield sizes | ({"num_moe_experts": experts} if experts else {})


def usable(config: Config, teacher: Shape) -> tuple[list[Candidate], list[str]]:
    """The grid's valid shapes, largest first, and for each of the others the reason why it is rejected.

    A valid shape can be pruned, repaired, split over the ranks and opened by transformers.
    """
    found, refusals = [], []
    for sizes in grid(config.search, teacher):
        try:
            shape = teacher.smaller(**sizes)
            check_size_is_known(teacher, shape)
            check_request(teacher, shape, config.prune, config.calibration)
            shape.check_parallel(config.parallel.tensor_model_parallel_size, "student")
            found.append(weigh(shape, config.search))
        except UserError as error:
            refusals.append(f"{name_of(sizes)}: {error}")
    return sorted(found, key=lambda candidate: -candidate.parameters), refusals


def check_size_is_known(teacher: Shape, shape: Shape) -> None:
    """Reject a candidate whose cost cannot be compared with the budget before its layers are chosen."""
    if teacher.layers_decide_sizes(shape.num_layers):
        raise UserError(
            f"search.num_layers={shape.num_layers}: dense layers and layers with experts differ in size, so the cost depends "
            f"on which are dropped; search with num_layers=[{teacher.num_layers}], or prune with prune.drop_layers"
        )


def candidates(config: Config, teacher: Shape) -> list[Candidate]:
    """The grid's valid shapes within the budget, largest first; raises what `within_budget` raises."""
    return within_budget(config.search, *usable(config, teacher))


def within_budget(search: SearchConfig, every: list[Candidate], refusals: list[str]) -> list[Candidate]:
    """The candidates of `every` within the budget. `refusals` are the reasons why the grid's other shapes were rejected.

    Raises:
        UserError: no target is set, no shape is valid, or none is within the budget; the message names the nearest one.
    """
    target = required_target(search)
    if not every:
        raise UserError(f"search: all {len(refusals)} candidate shapes were rejected; first reason: {refusals[0]}")
    distance = {candidate.name: abs(getattr(candidate, search.budget) / target - 1) for candidate in every}
    fitting = [candidate for candidate in every if distance[candidate.name] <= search.allowed_distance]
    if not fitting:
        nearest = min(every, key=lambda candidate: distance[candidate.name])
        raise UserError(
            f"search.target={target:,.10g}: none of {len(every)} shapes has {search.budget} within "
            f"±{search.allowed_distance:.1%}; the nearest, {nearest.name}, has "
            f"{getattr(nearest, search.budget):,.10g}; change search.target, search.tolerance or the lists of sizes, "
            "such as search.hidden_size"
        )
    return fitting


def required_target(search: SearchConfig) -> float:
    """search.target, which a search needs.

    Raises:
        UserError: it is not set.
    """
    if search.target is None:
        example = "10" if search.budget is Budget.latency_ms else "4.0e9"
        raise UserError(
            f"search.target is not set: a search needs the {search.budget} to aim at; set it, like {example}"
        )
    return search.target


def choose(found: list[Candidate], only: int | None) -> list[Candidate]:
    """All candidates, or only number `only`, counted from 1.

    Raises:
        UserError: there are fewer than `only`.
    """
    if only is not None and only > len(found):
        raise UserError(f"search.only={only}: there are {len(found)} candidates; give a number from 1 to {len(found)}")
    return found if only is None else [found[only - 1]]


def table(found: list[Candidate]) -> str:
    """The candidates as a plain-text table; the time of a token only where it was measured."""
    is_timed = any(c.latency_ms is not None for c in found)
    heads = f"{'candidate':26}{'parameters':>16}{'non-embedding':>16}{'memory GiB':>12}{'GFLOP/token':>13}"
    lines = [f"{heads}{'ms/token' if is_timed else '':>{10 * is_timed}}{'loss':>9}{'retrained':>11}"]
    for c in found:
        losses = [f"{loss:.4f}" if loss is not None else "-" for loss in (c.zero_shot_loss, c.retrained_loss)]
        latency = f"{c.latency_ms:>10.3g}" if c.latency_ms is not None else ""
        lines.append(
            f"{c.name:26}{c.parameters:>16,}{c.non_embedding_parameters:>16,}{c.memory_gib:>12.2f}"
            f"{c.flops_per_token / 1e9:>13.2f}{latency}{losses[0]:>9}{losses[1]:>11}"
        )
    return "\n".join(lines)
