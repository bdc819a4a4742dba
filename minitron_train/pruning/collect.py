"""Activation statistics: a table of hook points, and one forward pass over the calibration tokens, layer by layer."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minitron_train.model.experts import Experts
from minitron_train.parallel.groups import Groups
from minitron_train.pruning.collect_experts import NEURONS, Seen, watching_experts
from minitron_train.pruning.layers import Layers, forward
from minitron_train.pruning.statistics import Moments, distance, over_sequence
from minitron_train.runtime.console import progress
from minitron_train.runtime.errors import UserError

# N sequences, S sequence, B batch, C channels (the rank's own), H hidden, L layers

Value = Callable[[torch.nn.Module, Tensor], Tensor]  # layer, activation [S, B, …] -> values to score [S, B, C]


@dataclass(frozen=True, slots=True)
class Point:
    """A hook point of a layer: a module's input or output, and the function that turns it into values to score."""

    module: str
    of_input: bool
    value: Value
    parallel: bool  # whether each tensor-parallel rank holds its own part of the channels


def gate_half(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The input of the activation function: the gate half of a gated MLP's first linear, or all of a plain one."""
    bias: Tensor | None = layer.get_submodule("mlp.linear_fc1").bias  # type: ignore[assignment]
    x = x if bias is None else x + bias  # megatron-core's linear leaves the bias to the MLP
    return x.chunk(2, dim=-1)[0] if layer.config.gated_linear_unit else x  # type: ignore[union-attr]


def shared_gate_half(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The input of a shared expert's activation function."""
    return x.chunk(2, dim=-1)[0]


def head_norms(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The L2 norm of every head's output at every token."""
    heads = x.unflatten(-1, (-1, layer.config.kv_channels))  # type: ignore[union-attr]
    return torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32)


def whole(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """The activation itself."""
    return x


POINTS = {
    "input_norm": Point("input_layernorm", False, whole, parallel=False),
    "mlp_norm": Point("pre_mlp_layernorm", False, whole, parallel=False),
    "head_channels": Point("self_attention.linear_proj", True, whole, parallel=True),
    "head_norms": Point("self_attention.linear_proj", True, head_norms, parallel=True),
    "neurons_pre": Point("mlp.linear_fc1", False, gate_half, parallel=True),
    "neurons_post": Point("mlp.linear_fc2", True, whole, parallel=True),
    "shared_pre": Point("mlp.shared_experts.linear_fc1", False, shared_gate_half, parallel=True),
    "shared_post": Point("mlp.shared_experts.linear_fc2", True, whole, parallel=True),
}
SHARED = ("shared_pre", "shared_post")  # of layers with a shared expert
FINAL_NORM = "final_norm"


@dataclass(slots=True)
class Statistics:
    """The results of scoring. Keys of `moments` are layers.{i}.POINT and final_norm."""

    num_layers: int
    num_tokens: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)  # layers.{i}.block: fp64 [2], Σ (1 - cos) and tokens
    experts: dict[str, Tensor] = field(
        default_factory=dict
    )  # layers.{i}.experts: fp64 [3, E], see collect_experts.Seen
    losses_without: Tensor | None = None  # fp64 [L + 1], nats: without layer i; the whole model's is last
    logit_changes: Tensor | None = None  # fp64 [L]: Σ (M - M_without)² / Σ M² of the logits M, for each layer
    spans: Tensor | None = None  # fp64 [L + 1, L + 1]: Σ over last tokens of cos between the inputs of layers i and j

    def cpu(self) -> "Statistics":
        """A copy on the CPU."""

        def host(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.cpu()

        return replace(
            self,
            moments={name: moments.cpu() for name, moments in self.moments.items()},
            blocks={name: block.cpu() for name, block in self.blocks.items()},
            experts={name: sums.cpu() for name, sums in self.experts.items()},
            losses_without=host(self.losses_without),
            logit_changes=host(self.logit_changes),
            spans=host(self.spans),
        )

    def add(self, name: str, x_SBC: Tensor, mask_SB: Tensor | None) -> None:
        """Add one micro-batch of one activation."""
        self.add_values(name, over_sequence(x_SBC, mask_SB))

    def add_values(self, name: str, values: Tensor) -> None:
        """Add mean |x|, L2 and variance per sequence, fp64 [3, B, …]."""
        new = Moments.of(values)
        self.moments[name] = self.moments[name].merge(new) if name in self.moments else new

    def add_experts(self, name: str, sums: Tensor) -> None:
        """Add one micro-batch of a layer's experts."""
        self.experts[name] = self.experts[name] + sums if name in self.experts else sums

    @contextlib.contextmanager
    def watching(self, layer: torch.nn.Module, i: int, mask: list[Tensor | None]) -> Iterator[None]:
        """Record every hook point of layer `i` during a block; `mask[0]` is the current micro-batch's mask."""

        def watch(name: str, point: Point) -> torch.utils.hooks.RemovableHandle:
            def see(x: Any) -> None:
                first = x[0] if isinstance(x, tuple) else x
                self.add(f"layers.{i}.{name}", point.value(layer, first), mask[0])

            module = layer.get_submodule(point.module)
            if point.of_input:
                return module.register_forward_pre_hook(lambda _, inputs: see(inputs))
            return module.register_forward_hook(lambda _, __, output: see(output))

        experts = layer.mlp if isinstance(layer.mlp, Experts) else None
        absent = SHARED if experts is None else NEURONS if experts.shared_experts is not None else (*NEURONS, *SHARED)
        handles = [watch(name, point) for name, point in POINTS.items() if name not in absent]
        try:
            with contextlib.ExitStack() as stack:
                if experts is not None:
                    seen = Seen(
                        experts,
                        mask,
                        add_neurons=lambda name, values: self.add_values(f"layers.{i}.{name}", values),
                        add_experts=lambda sums: self.add_experts(f"layers.{i}.experts", sums),
                    )
                    stack.enter_context(watching_experts(seen))
                yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def collect(layers: Layers, tokens_NS: Tensor, *, micro_batch_size: int, chunk_tokens: int) -> Statistics:
    """One forward pass over the sequences, layer by layer, in chunks of `chunk_tokens`.

    Memory: the residual stream of one chunk, the activations of one micro-batch inside a layer, and the layers that
    `layers` holds. A negative token is padding (at the end of a sequence) and is ignored.
    """
    statistics = Statistics(layers.shape.num_layers, num_tokens=int((tokens_NS >= 0).sum()))
    chunks = tokens_NS.split(max(1, chunk_tokens // tokens_NS.shape[1]))
    walk = (i for chunk in chunks for i in count_chunk(statistics, layers, chunk.split(micro_batch_size)))
    for _ in progress(walk, "score", len(chunks) * layers.shape.num_layers):
        pass
    return statistics


def count_chunk(statistics: Statistics, layers: Layers, batches: tuple[Tensor, ...]) -> Iterator[int]:
    """Add one chunk of batches, [B, S] each; yields after every layer."""
    device, rotary = layers.groups.device, layers.rotary(batches[0].shape[1])
    masks = [None if bool((batch >= 0).all()) else (batch >= 0).t().to(device) for batch in batches]
    last = [(batch >= 0).sum(1).sub(1).clamp(min=0).to(device) for batch in batches]
    hidden = [layers.embed(batch) for batch in batches]
    ends = [last_tokens(hidden, last)]
    for i in range(layers.shape.num_layers):
        layer, current = layers[i], [masks[0]]
        with statistics.watching(layer, i, current):
            for k, mask in enumerate(masks):
                current[0] = mask
                after = forward(layer, hidden[k], rotary)
                count_block(statistics, i, hidden[k], after, mask)
                hidden[k] = after
        ends.append(last_tokens(hidden, last))
        yield i
    for x, mask in zip(hidden, masks, strict=True):
        statistics.add(FINAL_NORM, layers.final_norm(x), mask)
    count_spans(statistics, ends)


def count_block(statistics: Statistics, i: int, before_SBH: Tensor, after_SBH: Tensor, mask_SB: Tensor | None) -> None:
    """Block importance of layer `i` (arXiv 2403.03853): 1 - cos between its input and its output, over all tokens."""
    name, new = f"layers.{i}.block", distance(before_SBH, after_SBH, mask_SB)
    statistics.blocks[name] = statistics.blocks[name] + new if name in statistics.blocks else new


def last_tokens(hidden: list[Tensor], last: list[Tensor]) -> Tensor:
    """Normalised hidden states of the last token of every sequence, [N, H]."""
    rows = [x[index, torch.arange(x.shape[1], device=x.device)] for x, index in zip(hidden, last, strict=True)]
    return torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)


def count_spans(statistics: Statistics, ends: list[Tensor]) -> None:
    """Add cosines between the inputs of any two layers, at the last tokens (as in arXiv 2403.17887)."""
    flat = torch.stack(ends).flatten(1)
    cosines = (flat @ flat.t()).double()
    statistics.spans = cosines if statistics.spans is None else statistics.spans + cosines


def merge_ranks(statistics: Statistics, groups: Groups) -> Statistics:
    """Statistics of all ranks: sequences are merged over data-parallel ranks, channels gathered over tensor-parallel ones."""
    for name, moments in statistics.moments.items():
        count = groups.sum_over_data(moments.count.clone())
        mean = groups.sum_over_data(moments.mean * (moments.count / count))
        apart = moments.deviations + moments.count * (moments.mean - mean).square()
        deviations = groups.sum_over_data(apart)
        parts = torch.stack([mean, deviations])
        point = POINTS.get(name.rsplit(".", 1)[-1])
        if point is not None and point.parallel:
            parts = torch.cat(groups.gather(parts), dim=-1)
        statistics.moments[name] = Moments(count, parts[0], parts[1])
    for block in (*statistics.blocks.values(), *statistics.experts.values()):
        groups.sum_over_data(block)
    assert statistics.spans is not None
    groups.sum_over_data(statistics.spans)
    total = torch.tensor(float(statistics.num_tokens), dtype=torch.float64, device=groups.device)
    statistics.num_tokens = int(groups.sum_over_data(total))
    return statistics


def check_finite(statistics: Statistics) -> None:
    """Reject NaN and infinities in activations; the message names the first layer and activation that has one."""
    for name, moments in statistics.moments.items():
        if not bool(torch.isfinite(moments.mean).all()):
            raise UserError(
                f"the model's activations: NaN or infinity, first seen at {name}; "
                "the weights are damaged or overflow: check the checkpoint, or set calibration.precision=fp32"
            )
