"""Hugging Face tensors into megatron-core parameters, one tensor at a time: the whole model is never held twice."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_train.arch.convert import Source, read_shard
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import EMBEDDING, FUSED_NORMS, OUTPUT, Architecture, ParamSpec
from minitron_train.parallel.groups import Groups

LAYER_NUMBER = re.compile(r"(?<=decoder\.layers\.)\d+")


def parameters_by_row(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The model's parameters under the names that the tables use, also where Transformer Engine fuses norm and linear.

    A pipeline stage numbers its layers from 0; the tables number those of the whole model. Where embedding and output layer
    are tied, the last stage holds a copy of the embedding, which goes by the embedding's name.
    """
    found, first_layer = {}, getattr(module, "first_layer", 0)
    for name, parameter in module.named_parameters():
        for fused, plain in FUSED_NORMS.items():
            name = name.replace(fused, plain)
        if name == OUTPUT and module.share_embeddings_and_output_weights:
            name = EMBEDDING
        found[LAYER_NUMBER.sub(lambda match: str(int(match[0]) + first_layer), name)] = parameter
    return found


def places(
    module: torch.nn.Module, table: Architecture, shape: Shape, experts: range | None = None
) -> Iterator[tuple[torch.nn.Parameter, ParamSpec, int]]:
    """Each parameter of a GPTModel, or of one pipeline stage of it, with its row and its layer, in the order of the table.

    A parameter of the model that the table does not cover is an assertion error.

    Args:
        experts: those that the model holds under expert parallelism; None: all.
    """
    parameters = parameters_by_row(module)
    is_whole = getattr(module, "num_stages", 1) == 1
    for row in table.rows_of(shape):
        if row.expert is not None and experts is not None and row.expert not in experts:
            continue
        for i in row.layers(shape):
            name = row.mcore.format(i=i)
            if is_whole or name in parameters:
                yield parameters.pop(name), row, i
    assert not parameters, f"parameters that the {table.name} table does not cover: {sorted(parameters)}"


@torch.no_grad()
def load_weights(
    module: torch.nn.Module, table: Architecture, shape: Shape, source: Source, rank: int = 0, size: int = 1
) -> None:
    """Fill a megatron-core GPTModel with the part of `source` that tensor-parallel rank `rank` of `size` holds."""
    for parameter, row, i in places(module, table, shape):
        parameter.copy_(read_shard(row, i, shape, source, rank, size))


@torch.no_grad()
def share_weights(module: torch.nn.Module, table: Architecture, shape: Shape, source: Source, groups: Groups) -> None:
    """`load_weights` on all ranks; collective. One rank of each data-parallel group reads, and broadcasts tensor by tensor.

    Under expert parallelism a rank loads its own experts, and those that hold the same experts share them.

    A rank that cannot read takes part in the broadcasts to the end, so that no other rank waits for it.

    Raises:
        UserError, MachineError: a rank cannot read its part; raised on every rank.
    """
    failure: Exception | None = None
    for parameter, row, i in places(module, table, shape, groups.own_experts(shape.num_moe_experts)):
        split = row.expert is not None and groups.ep_size > 1
        if (groups.edp_rank if split else groups.dp_rank) == 0 and failure is None:
            try:
                parameter.copy_(read_shard(row, i, shape, source, groups.tp_rank, groups.tp_size))
            except Exception as error:  # of any class: raised below, on all ranks
                failure = error
        groups.from_first_replica(parameter, of_experts=split)
    groups.raise_together(failure)


def share_output_rows(
    table: Architecture, shape: Shape, source: Source, groups: Groups, dtype: torch.dtype, num_rows: int
) -> Tensor:
    """Read the output layer alone, split into `num_rows` rows a rank, in `dtype`: [num_rows, H]; collective, on all ranks.

    Tensor-parallel rank r gets the rows r x `num_rows` to (r+1) x `num_rows`. Rows beyond the vocabulary are 0. A pipeline
    stage without the output layer gets none.

    Raises:
        UserError, MachineError: a rank cannot read its rows; raised on every rank.
    """
    size = (num_rows if groups.is_last_stage else 0, shape.hidden_size)
    rows_VH, failure = torch.zeros(size, dtype=dtype, device=groups.device), None
    start, real = groups.tp_rank * num_rows, shape.real_rows(groups.tp_rank, groups.tp_size, num_rows)
    if groups.dp_rank == 0 and groups.is_last_stage and real:
        try:
            rows_VH[:real] = source.read(table.output_name(shape), 0, start, start + real)
        except Exception as error:  # of any class: raised below, on all ranks
            failure = error
    groups.from_first_replica(rows_VH)
    groups.raise_together(failure)
    return rows_VH
