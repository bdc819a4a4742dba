"""Sharded state dicts: each rank saves its own share of the weights and of AdamW's state, as boxes of whole tensors.

megatron-core's distributed optimizer gives every data-parallel rank an interval of each flattened parameter. Its own formats
do not suit a checkpoint of many ranks. `dp_reshardable` cannot change the tensor-parallel size. `fully_reshardable` gathers all
state on one rank. Without Transformer Engine and Apex, neither can be resumed: megatron-core 0.16 asserts a `step` that a new
optimizer lacks, and its load_state_dict gives all parameters one step tensor, which each of them then increments.

This module cuts an interval into boxes of the parameter and needs no communication. torch.distributed.checkpoint reads the
boxes that overlap a request, so any number of ranks can load the result, with a sharded or an unsharded optimizer.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from math import prod
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"  # fp32 copy of a bf16 weight
STATE_KEY = "optimizer.state.{name}.{key}"  # a tensor's name in the checkpoint; `key` is the weight's name
MASTER_KEYS = ("optimizer.state.fp32_param.", "optimizer.state.param.")  # here, and in `fully_reshardable`

Sharded = ShardedTensor | ShardedTensorFactory
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


@dataclass(frozen=True, slots=True)
class Held:
    """AdamW's state of the elements [start, stop) of a flattened weight, which this rank updates."""

    weight: Tensor
    start: int
    stop: int
    state: dict[str, Tensor]  # fp32, flat: exp_avg, exp_avg_sq, and fp32_param if the weight is bf16

    def part(self, start: int, stop: int) -> "Held":
        """Return the elements [start, stop) of the weight, which must lie in this interval."""
        inside = slice(start - self.start, stop - self.start)
        return Held(self.weight, start, stop, {name: tensor[inside] for name, tensor in self.state.items()})


def held_state(optimizers: Iterable[MegatronOptimizer]) -> list[Held]:
    """Return the state of every weight that this rank updates, as views. Call `create_state` before."""
    found = []
    for optimizer in optimizers:
        for weight, main in updated(optimizer):
            state = {name: flat(optimizer.optimizer.state[main][name]) for name in MOMENTS}  # type: ignore[union-attr]
            if weight.dtype != torch.float32:
                state[MASTER] = flat(main)
            start = 0
            if isinstance(optimizer, DistributedOptimizer):
                start = optimizer._get_model_param_range_map(weight)["param"].start
            found.append(Held(weight, start, start + main.numel(), state))
    return found


def updated(optimizer: MegatronOptimizer) -> Iterator[tuple[Parameter, Tensor]]:
    """Yield each weight and the fp32 tensor that AdamW updates: a shard, a copy, or the weight itself."""
    if isinstance(optimizer, DistributedOptimizer):
        weights = (*optimizer.model_float16_groups, *optimizer.model_fp32_groups)
        mains = (*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        weights = (*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups)
        mains = (*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups)
    else:
        weights = mains = tuple(group["params"] for group in optimizer.param_groups)
    yield from zip(chain.from_iterable(weights), chain.from_iterable(mains), strict=True)


def create_state(optimizers: Iterable[MegatronOptimizer]) -> None:
    """Create AdamW's state as it is before the first step. torch would create it in the first step."""
    for optimizer in optimizers:
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    set_step(optimizers, 0)


def set_step(optimizers: Iterable[MegatronOptimizer], step: int) -> None:
    """Set the number of AdamW updates. torch counts them per parameter, in a tensor of its own, FusedAdam per group."""
    for optimizer in optimizers:
        inner = optimizer.optimizer
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            for main, state in inner.state.items():
                state["step"] = torch.tensor(float(step), device=main.device)
        else:
            for group in inner.param_groups:  # type: ignore[union-attr]
                group["step"] = step


def flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def own_share(held: list[Held], rank: int, size: int) -> Iterator[Held]:
    """Yield the share that rank `rank` of `size` ranks saves of state that all of them hold: an equal number of elements."""
    total = sum(entry.stop - entry.start for entry in held)
    first, last = (total * k // size for k in (rank, rank + 1))
    ends = accumulate(entry.stop - entry.start for entry in held)
    for entry, end in zip(held, ends, strict=True):
        offset = entry.stop - end  # from a position in all elements to one in this weight
        start, stop = max(entry.start, first + offset), min(entry.stop, last + offset)
        if start < stop:
            yield entry.part(start, stop)


def state_to_save(model: dict[str, Any], share: Iterable[Held]) -> dict[str, Any]:
    """Return the sharded state dict of this rank's share: boxes of weights and optimizer state.

    Args:
        model: the model's sharded state dict.
        share: disjoint over the data-parallel ranks.
    """
    places = sharded_weights(model)
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for entry in share:
        place, interval = places[id(entry.weight)], (entry.start, entry.stop)
        values = flat(entry.weight)[entry.start : entry.stop]
        weights |= sharded_boxes("{key}", place, values, *interval, replica=0)
        for name, tensor in entry.state.items():
            state |= sharded_boxes(STATE_KEY.replace("{name}", name), place, tensor, *interval, replica=0)
    rest = {name: value for name, value in model.items() if not is_weight(value)}
    return {"model": rest | weights, "optimizer": state}


def state_to_load(model: dict[str, Any], parts: Iterable[tuple[list[Held], int]]) -> dict[str, Any]:
    """Return the sharded state dict that a checkpoint fills: whole weights, and the optimizer state that this rank holds.

    Args:
        parts: state, with this rank's number among the ranks that hold the same.
    """
    places = sharded_weights(model)
    state: dict[str, Any] = {}
    for entry, replica in ((entry, replica) for held, replica in parts for entry in held):
        for name, tensor in entry.state.items():
            key, place = STATE_KEY.replace("{name}", name), places[id(entry.weight)]
            state |= sharded_boxes(key, place, tensor, entry.start, entry.stop, replica=replica)
    return {"model": {name: without_padding(entry) for name, entry in model.items()}, "optimizer": state}


def copy_loaded(template: dict[str, ShardedTensor], loaded: dict[str, Any]) -> None:
    """Copy loaded optimizer state into the live tensors of `template`, where it has not been loaded in place."""
    for name, box in template.items():
        assert box.data is not None
        box.data.copy_(loaded[name])


def is_weight(value: Any) -> bool:
    """Whether an entry of a sharded state dict is a parameter that is trained."""
    return isinstance(value, Sharded) and isinstance(value.data, Tensor) and value.data.requires_grad


def sharded_weights(model: dict[str, Any]) -> dict[int, list[ShardedTensor]]:
    """Return the tensors of the checkpoint that each trained weight belongs to, by the weight's id.

    A gated MLP's first matrix holds two of them, one above the other, so that the tensor-parallel size can change.
    """
    found: dict[int, list[ShardedTensor]] = {}
    for value in model.values():
        if is_weight(value):
            parts = cast(Any, value.build()) if isinstance(value, ShardedTensorFactory) else [value]
            found[id(value.data)] = [without_padding(part) for part in parts]
    return found


def without_padding(entry: Any) -> Any:
    """Return an entry of a sharded state dict without the padding of the vocabulary, which checkpoints do not have.

    A checkpoint is thus the same for all tensor-parallel sizes.
    """
    if not hasattr(getattr(entry, "data", None), "real_rows"):
        return entry
    local, whole = entry.data.real_rows
    return replace(
        entry,
        data=entry.data.detach()[:local],
        local_shape=(local, *entry.local_shape[1:]),
        global_shape=(whole, *entry.global_shape[1:]),
        axis_fragmentations=None,
        allow_shape_mismatch=False,
    )


def with_padding(model: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a loaded state dict with the padding of the vocabulary, whose values do not matter.

    Args:
        weights: the model's parameters, with padding.
    """

    def whole(name: str, loaded: Any) -> Any:
        if not hasattr(weights.get(name), "real_rows"):
            return loaded
        padded = weights[name].detach().clone()
        padded[: len(loaded)] = loaded
        return padded

    return {name: whole(name, loaded) for name, loaded in model.items()}


def sharded_boxes(
    key: str, place: list[ShardedTensor], values: Tensor, start: int, stop: int, *, replica: int
) -> dict[str, ShardedTensor]:
    """Return the elements [start, stop) of a flattened weight as boxes of the tensors in `place`, by a unique name.

    Args:
        key: name in the checkpoint, a pattern for the name of the weight.
        values: the elements themselves, flat.
        replica: data-parallel part of the replica number; 0 is saved.
    """
    found, before = {}, 0
    for part in place:
        end = before + prod(part.local_shape)
        position = max(start, before)
        for offsets, sizes in boxes(part.local_shape, position - before, max(position, min(stop, end)) - before):
            local = (1,) * part.prepend_axis_num + sizes
            shift = (0,) * part.prepend_axis_num + offsets
            where = tuple(first + more for first, more in zip(part.global_offset, shift, strict=True))
            data = values[position - start : position - start + prod(sizes)].view(local)
            box = replace(
                part,
                key=key.format(key=part.key),
                data=data,
                dtype=data.dtype,
                local_shape=local,
                global_offset=where,
                axis_fragmentations=None,
                prepend_axis_num=0,
                replica_id=(*part.replica_id[:2], replica),  # type: ignore[index]
            )
            found[f"{box.key}@{','.join(map(str, where))}"] = box
            position += prod(sizes)
        before = end
    return found


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the elements [start, stop) of a flattened tensor into boxes, in order."""
    if start == stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = prod(shape[1:])
    head, tail = -(-start // row), stop // row  # the whole rows [head, tail)

    def inside(k: int, first: int, last: int) -> list[Box]:
        return [((k, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape[1:], first, last)]

    if head > tail:
        return inside(tail, start - tail * row, stop - tail * row)
    found = inside(head - 1, start - (head - 1) * row, row) if start < head * row else []
    if head < tail:
        found.append(((head, *(0 for _ in shape[1:])), (tail - head, *shape[1:])))
    return found + inside(tail, 0, stop - tail * row)


def with_former_names(template: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return `template` with the former names of master weights, if a checkpoint of the tensors `names` uses them."""
    now, former = MASTER_KEYS
    if any(name.startswith(now) for name in names) or not any(name.startswith(former) for name in names):
        return template
    state = {name: replace(box, key=box.key.replace(now, former, 1)) for name, box in template["optimizer"].items()}
    return template | {"optimizer": state}
