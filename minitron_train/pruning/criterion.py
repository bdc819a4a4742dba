"""What a pruning criterion is: a module that ranks channels, heads and neurons (`width`) or picks layers (`depth`).

A criterion is one file of `pruning/criteria/`, found by its file name (`prune.width=NAME`, `prune.depth=NAME`), or any
importable module, named with its dots (`prune.width=my_lab.taylor`). The first line of its docstring describes it in
`dry_run`. It defines one function:

    def width(evidence: Evidence) -> Width: ...                          # a width criterion
    def depth(evidence: Evidence, num_layers: int) -> Tensor: ...        # a depth criterion: kept layers, ascending
    NEEDS_LAYER_REMOVAL = True      # of a depth criterion that reads losses_without or logit_changes (slow to measure)
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

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
    """What a criterion may look at.

    Attributes:
        statistics: of the activations over the calibration tokens (see pruning.collect.POINTS), on the host.
        source: the weights, by Hugging Face name, one tensor at a time: `source.read(name)`.
        table: which parameters there are, and which axis each of their dimensions is.
        seed: for criteria that draw numbers.
    """

    statistics: Statistics
    source: Source
    table: Architecture
    shape: Shape
    prune: PruneConfig
    seed: int


@dataclass(frozen=True, slots=True)
class Width:
    """Importance of everything that makes a layer's size; the higher, the longer it stays. Lists: one entry per layer."""

    embedding: Tensor  # [hidden_size], the same channels in all layers
    heads: list[Tensor]  # [num_attention_heads] each
    ffn: list[Tensor]  # [ffn_hidden_size] each


class UnitSquares:
    """Sums of squares by unit, for criteria that are an L2 norm over all that belongs to a unit."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.sums: dict[tuple[str, int], Tensor] = {}  # (axis, layer) -> fp64 [length of the axis]

    def add(self, axis: str, layer: int, squares: Tensor) -> None:
        """Add to the units of one axis (see arch.table); channels are the same in all layers."""
        key = axis, 0 if axis == "embd" else layer
        self.sums[key] = self.sums[key] + squares if key in self.sums else squares

    def norms(self) -> Width:
        """The square roots, those of a head's channels together."""
        layers = range(self.shape.num_layers)
        return Width(
            embedding=self.sums["embd", 0].sqrt(),
            heads=[self.sums["q", i].view(-1, self.shape.kv_channels).sum(1).sqrt() for i in layers],
            ffn=[self.sums["ffn", i].sqrt() for i in layers],
        )


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
        UserError: there is none of that name; the line lists those that exist.
    """
    module = find("prune.width", name, "width")
    return WidthCriterion(summary(module), module.width)


def depth_criterion(name: str) -> DepthCriterion:
    """The criterion that `prune.depth` names.

    Raises:
        UserError: there is none of that name; the line lists those that exist.
    """
    module = find("prune.depth", name, "depth")
    return DepthCriterion(summary(module), module.depth, bool(getattr(module, "NEEDS_LAYER_REMOVAL", False)))


def outside_criteria(prune: PruneConfig) -> dict[str, str]:
    """Hashes of the criteria that come from outside this package, by label: what is cut depends on their code."""
    named = {"width": prune.width, "depth": prune.depth}
    modules = {name: find(f"prune.{function}", name, function) for function, name in named.items() if "." in name}
    return {f"criterion {name}": code_hash(module) for name, module in modules.items()}


def find(key: str, name: str, function: str) -> ModuleType:
    """The module of a criterion; `function` tells width from depth."""
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
    """The program's own criteria, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(criteria.__path__))


def module_of(name: str) -> ModuleType:
    """One of the program's own criteria."""
    return importlib.import_module(f"{criteria.__name__}.{name}")


def summary(module: ModuleType) -> str:
    """The first line of a criterion's docstring, without its full stop."""
    lines = (module.__doc__ or module.__name__).strip().splitlines()
    return lines[0].removesuffix(".")


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; of equal scores the first wins."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
