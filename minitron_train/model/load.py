"""Hugging Face tensors into megatron-core parameters, one tensor at a time: the whole model is never held twice."""

import torch

from minitron_train.arch.convert import Source, read_shard
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import FUSED_NORMS, Architecture


def parameters_by_row(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The model's parameters under the names that the tables use, also where Transformer Engine fuses norm and linear."""
    found = {}
    for name, parameter in module.named_parameters():
        for fused, plain in FUSED_NORMS.items():
            name = name.replace(fused, plain)
        found[name] = parameter
    return found


@torch.no_grad()
def load_weights(
    module: torch.nn.Module, table: Architecture, shape: Shape, source: Source, rank: int = 0, size: int = 1
) -> None:
    """Fill a megatron-core GPTModel with the part of `source` that tensor-parallel rank `rank` of `size` holds.

    A parameter of the model that the table does not cover is an assertion error.
    """
    parameters = parameters_by_row(module)
    for row in table.rows_of(shape):
        for i in row.layers(shape):
            parameter = parameters.pop(row.mcore.format(i=i))
            parameter.copy_(read_shard(row, i, shape, source, rank, size))
    assert not parameters, f"parameters that the {table.name} table does not cover: {sorted(parameters)}"
