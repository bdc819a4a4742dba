"""Trained weights of which every pipeline stage has a copy, apart from tied embeddings, which megatron-core handles."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import Parameter

from minitron_train.parallel.groups import Groups

COPIES = "is_on_every_stage"  # an attribute of such a weight


def mark_copies(module: torch.nn.Module, groups: Groups) -> None:
    """Note that every stage has a copy of a module's weights. Call it before megatron-core's DDP and optimizer.

    `shared` makes the gradient norm count the first stage's copy alone. `shared_embedding` gives a weight a bucket of its
    own, so that a sharded optimizer gives a rank the same part of the weight on each stage.
    """
    for parameter in module.parameters() if groups.pp_size > 1 else ():
        for name, value in ((COPIES, True), ("shared_embedding", True), ("shared", groups.pp_rank > 0)):
            setattr(parameter, name, value)


def sum_copies(parameters: Iterable[Parameter]) -> None:
    """Sum the gradients of all copies over the stages, after megatron-core has summed them over the data; collective."""
    for parameter in parameters:
        if getattr(parameter, COPIES, False):
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.all_reduce(parameter.main_grad, group=group)  # type: ignore[attr-defined]


def sharded_copies(module: torch.nn.Module, prefix: str, sharded_offsets: Any) -> dict[str, Any]:
    """Megatron-core's description of a module's weights in a checkpoint, which the first stage saves and all stages load."""
    values = module.state_dict(prefix="", keep_vars=True)
    found = make_sharded_tensors_for_checkpoint(values, prefix, {}, sharded_offsets)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {name: replace(entry, replica_id=(stage, *entry.replica_id[1:])) for name, entry in found.items()}
