"""Pruning criteria: modules that score channels, heads and neurons (`width`) or choose layers (`depth`).

A criterion is one file of `pruning/criteria/`, found by its file name (`prune.width=NAME`, `prune.depth=NAME`), or any
importable module, named with its dots (`prune.width=my_lab.taylor`). The first line of its docstring describes it in
`dry_run`. It defines one function:

    def width(evidence: Evidence) -> Width: ...                          # a width criterion
    def depth(evidence: Evidence, num_layers: int) -> Tensor: ...        # a depth criterion: kept layers, ascending
    NEEDS_LAYER_REMOVAL = True      # if a depth criterion reads losses_without or logit_changes (slow to measure)

A criterion reads activations and weights like this:

    moments = evidence.statistics.moments["layers.0.neurons_post"]         # the points are in pruning.collect.POINTS
    sizes = moments.aggregate(Aggregation.mean, Aggregation.mean)          # mean |x| over tokens, then over sequences
    row = next(row for row in evidence.table.rows if row.mcore == LAYER + "mlp.linear_fc2.weight")
    weights = [evidence.source.read(name.format(i=0)).double() for name in row.hf]

`criteria/wanda.py` lists which point sees the input of which linear.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minitron_train.arch.convert import Source
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import Architecture
from minitron_train.config import PruneConfig
from minitron_train.pruning import criteria
from minitron_train.pruning.collect import Statistics
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.plugins import code_hash, import_module


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The input of a criterion.

    Attributes:
        statistics: activation statistics over the calibration tokens (see pruning.collect.POINTS), on the CPU.
        source: the weights in the dtype of the file, read one tensor at a time by Hugging Face name: `source.read(name)`.
        table: all parameters of the model, and the axis of each of their dimensions.
        seed: for criteria that draw random numbers.
    """

    statistics: Statistics
    source: Source
    table: Architecture
    shape: Shape
    prune: PruneConfig
    seed: int


@dataclass(frozen=True, slots=True)
class Width:
    """Importance of channels, heads and neurons; the highest scores are kept. Lists have one entry per layer.

    A dense layer among layers with experts has [dense_ffn_hidden_size] in `ffn`, and [0] in `experts` and `shared`.
    """

    embedding: Tensor  # [hidden_size], the same channels in all layers
    heads: list[Tensor]  # [num_attention_heads] each
    ffn: list[Tensor]  # [ffn_hidden_size] each; with experts [num_moe_experts, ffn_hidden_size]
    experts: list[Tensor] = field(default_factory=list)  # [num_moe_experts] each; empty without experts
    shared: list[Tensor] = field(default_factory=list)  # neurons of shared experts; empty without one


class UnitSquares:
    """Sums of squares per channel, head, neuron or expert, for criteria that are an L2 norm over a unit's weights."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        # (axis, layer, expert; None outside of experts) -> fp64 [length of the axis]
        self.sums: dict[tuple[str, int, int | None], Tensor] = {}

    def add(self, axis: str, layer: int, squares: Tensor, expert: int | None = None) -> None:
        """Add to the units of one axis (see arch.table); channels are summed over layers and experts."""
        key = ("embd", 0, None) if axis == "embd" else (axis, layer, expert)
        self.sums[key] = self.sums[key] + squares if key in self.sums else squares

    def norms(self) -> Width:
        """The square roots of the sums; a head sums over its channels."""
        layers = range(self.shape.num_layers)
        absent = torch.zeros(0, dtype=torch.float64)
        width = Width(
            embedding=self.sums["embd", 0, None].sqrt(),
            heads=[self.sums["q", i, None].view(-1, self.shape.kv_channels).sum(1).sqrt() for i in layers],
            ffn=[self._neurons(i).sqrt() for i in layers],
        )
        if self.shape.num_moe_experts:
            width.experts.extend(self.sums.get(("expert", i, None), absent).sqrt() for i in layers)
        if self.shape.moe_shared_expert_intermediate_size:
            width.shared.extend(self.sums.get(("shared", i, None), absent).sqrt() for i in layers)
        return width

    def _neurons(self, layer: int) -> Tensor:
        for axis in ("ffn", "dense"):
            if (axis, layer, None) in self.sums:
                return self.sums[axis, layer, None]
        return torch.stack([self.sums["ffn", layer, e] for e in range(self.shape.num_moe_experts)])


@dataclass(frozen=True, slots=True)
class WidthCriterion:
    """A criterion for channels, heads and neurons."""

    summary: str
    width: Callable[[Evidence], Width]


@dataclass(frozen=True, slots=True)
class DepthCriterion:
    """A criterion for layers."""

    summary: str
    depth: Callable[[Evidence, int], Tensor]
    needs_layer_removal: bool


def width_criterion(name: str) -> WidthCriterion:
    """The criterion that `prune.width` names.

    Raises:
        UserError: there is no such criterion; the message lists the available ones.
    """
    module = find("prune.width", name, "width")
    return WidthCriterion(summary(module), lambda evidence: check_width(name, module.width(evidence), evidence.shape))


def depth_criterion(name: str) -> DepthCriterion:
    """The criterion that `prune.depth` names.

    Raises:
        UserError: there is no such criterion; the message lists the available ones.
    """
    module = find("prune.depth", name, "depth")

    def depth(evidence: Evidence, num_layers: int) -> Tensor:
        return check_layers(name, module.depth(evidence, num_layers), num_layers, evidence.shape.num_layers)

    return DepthCriterion(summary(module), depth, bool(getattr(module, "NEEDS_LAYER_REMOVAL", False)))


def check_width(name: str, found: Any, shape: Shape) -> Width:
    """Reject scores of a wrong size, which would keep the wrong units, and NaN, which has no rank."""
    if not isinstance(found, Width):
        rule = "return a Width, see minitron_train/pruning/criterion.py"
        raise UserError(f"prune.width={name}: returned {described(found)}; {rule}")
    units = [shape.unit_sizes(kind) for kind in shape.layer_kinds]
    sizes = {part: [list(layer[part]) for layer in units] for part in ("ffn", "experts", "shared")}
    wanted = {
        "heads": (found.heads, [[shape.num_attention_heads]] * shape.num_layers),
        "ffn": (found.ffn, sizes["ffn"]),
        "experts": (found.experts, sizes["experts"] if shape.num_moe_experts else []),
        "shared": (found.shared, sizes["shared"] if shape.moe_shared_expert_intermediate_size else []),
        "embedding": ([found.embedding], [[shape.hidden_size]]),
    }
    for part, (scores, sizes) in wanted.items():
        if len(scores) != len(sizes):
            raise UserError(
                f"prune.width={name}: {part} has {len(scores)} tensors; return one for each of {len(sizes)} layers"
            )
        for score, size in zip(scores, sizes, strict=True):
            if not isinstance(score, Tensor) or list(score.shape) != size:
                raise UserError(f"prune.width={name}: {part} holds {described(score)}; return scores of size {size}")
            if bool(score.isnan().any()):
                raise UserError(f"prune.width={name}: {part} holds NaN, which has no rank; correct the criterion")
    return found


def check_layers(name: str, found: Any, num_layers: int, num_teacher: int) -> Tensor:
    """Reject anything but `num_layers` ascending layer numbers of a teacher with `num_teacher` layers."""
    rule = f"return the numbers of {num_layers} of the {num_teacher} layers, ascending"
    if not isinstance(found, Tensor) or found.is_floating_point() or found.dim() != 1:
        raise UserError(f"prune.depth={name}: returned {described(found)}; {rule} (an int64 tensor)")
    values = found.tolist()
    if len(values) != num_layers or values != sorted(set(values) & set(range(num_teacher))):
        raise UserError(f"prune.depth={name}: returned {values}; {rule}")
    return found


def described(value: Any) -> str:
    """Type and size of a tensor, or the type of anything else, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of type {str(value.dtype).removeprefix('torch.')} and size {list(value.shape)}"
    return type(value).__name__


def outside_criteria(prune: PruneConfig) -> dict[str, str]:
    """Hashes of the code of user-defined criteria, by label. They are inputs of the pruning stage."""
    named = {"width": prune.width, "depth": prune.depth}
    modules = {name: find(f"prune.{function}", name, function) for function, name in named.items() if "." in name}
    return {f"criterion {name}": code_hash(module) for name, module in modules.items()}


def find(key: str, name: str, function: str) -> ModuleType:
    """The module of a criterion; `function` is "width" or "depth"."""
    inside = names()
    if "." not in name and name not in inside:
        own = [known for known in inside if hasattr(module_of(known), function)]
        raise UserError(
            f"{key}={name}: no such criterion; choose one of {', '.join(own)}, or name your own, like my_lab.taylor"
        )
    module = module_of(name) if name in inside else import_module(key, name)
    if not callable(getattr(module, function, None)):
        raise UserError(
            f"{key}={name}: {module.__name__} defines no function {function}; see minitron_train/pruning/criterion.py"
        )
    return module


def names() -> list[str]:
    """Names of the built-in criteria, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(criteria.__path__))


def module_of(name: str) -> ModuleType:
    """The module of a built-in criterion."""
    return importlib.import_module(f"{criteria.__name__}.{name}")


def summary(module: ModuleType) -> str:
    """The first line of a criterion's docstring, without its full stop."""
    lines = (module.__doc__ or module.__name__).strip().splitlines()
    return lines[0].removesuffix(".")


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; among equal scores the first is preferred."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
