"""Exact counts of parameters and floating-point operations, from the shapes."""

import functools
from collections.abc import Iterable
from math import prod
from typing import Any

from minitron_train.arch import ParamSpec, Shape, architecture
from minitron_train.arch.layer_kind import LayerKind, keys_per_query
from minitron_train.arch.pipeline import stage_layers

MATRIX_PARTS = ("attention", "mlp", "output")  # multiplied with every token; the embedding is a lookup


def parameters(shape: Shape) -> dict[str, Any]:
    """Count all parameters, those without embedding and output layer, and by part. Tied weights count once.

    `active_parameters` process one token: all but the experts that the router does not choose. Dense models lack the key.
    """
    table = architecture(shape.architecture)
    parts = table.parameters(shape)
    total = sum(parts.values())
    active = {"active_parameters": sum(table.parameters(shape, active=True).values())} if shape.num_moe_experts else {}
    return {
        "parameters": total,
        **active,
        "non_embedding_parameters": total - parts["embedding"] - parts["output"],
        "parameters_by_part": parts,
    }


@functools.cache
def parameters_per_rank(shape: Shape, tp: int, ep: int = 1, stage: int = 0, num_stages: int = 1) -> int:
    """Count the parameters of one rank: its shard of split matrices, replicated norms, and its part of the experts.

    Of the pipeline stages, the first has the embedding, the last the final norm and the output layer, or a copy of a tied
    embedding.
    """

    def number(row: ParamSpec) -> int:
        is_last = stage == num_stages - 1
        if row.per_layer:
            own = stage_layers(shape.num_layers, num_stages)[stage]
            return sum(i in own for i in row.layers(shape))
        if row.mcore.startswith("embedding."):
            return int(stage == 0) + int(shape.tie_embeddings and is_last and stage > 0)
        return int(is_last)

    return sum(each_rank_size(shape, row, tp, ep) * number(row) for row in templates(shape))


def expert_parameters_per_rank(shape: Shape, tp: int, ep: int) -> int:
    """Count the parameters of the experts that one rank holds."""
    rows = [row for row in templates(shape) if row.per_expert]
    return sum(each_rank_size(shape, row, tp, ep) * row.num_layers(shape) for row in rows)


def assumed_layers(teacher: Shape, student: Shape, drop_layers: Iterable[int] | None) -> str | None:
    """The kinds of layers that a student's counts assume, where its size depends on which are dropped and none are named."""
    if drop_layers is not None or not teacher.layers_decide_sizes(student.num_layers):
        return None
    dense = sum(kind.is_dense for kind in student.layer_kinds)
    return f"{student.num_layers - dense} layers with experts and {dense} dense; prune.depth chooses them after scoring"


def layer_parameters(shape: Shape, kinds: Iterable[LayerKind], tp: int = 1) -> int:
    """Count the parameters of one layer of each of these kinds on one tensor-parallel rank."""
    sizes = [(row, each_rank_size(shape, row, tp, 1)) for row in templates(shape) if row.per_layer]
    return sum(size for kind in kinds for row, size in sizes if row.is_in(kind))


def templates(shape: Shape) -> tuple[ParamSpec, ...]:
    """The rows of a shape's table, with one for all experts: plans ask often, and 128 experts make many rows."""
    return architecture(shape.architecture).templates_of(shape)


def each_rank_size(shape: Shape, row: ParamSpec, tp: int, ep: int) -> int:
    """Count a row's parameters in one layer on one rank."""
    size = sum(prod(size) for size in row.sizes(shape).values())
    copies = shape.num_moe_experts // ep if row.per_expert else 1
    return (size if row.parallel_dim() is None else size // tp) * copies


def forward_flops_per_token(shape: Shape, seq_length: int, *, causal: bool = True) -> int:
    """Count the FLOPs of a forward pass per token; a multiply-add counts as two.

    Matrices cost 2 FLOPs per parameter that processes the token. Attention costs Q K^T and P V with `seq_length` keys, or
    half as many if `causal` (the papers' figures count all keys), and fewer in layers with a window.
    """
    parts = architecture(shape.architecture).parameters(shape, active=True)
    matrices = sum(parts[name] for name in MATRIX_PARTS)
    if shape.tie_embeddings:
        matrices += parts["embedding"]  # the output layer uses the same matrix
    return int(2 * matrices + attention_flops_per_token(shape, seq_length, causal=causal))


def attention_flops_per_token(shape: Shape, seq_length: int, *, causal: bool = True) -> float:
    """Count the FLOPs of Q K^T and P V in all layers per token."""
    by_kind = [keys_per_query(kind, seq_length, causal=causal) for kind in shape.kinds]
    keys = sum(by_kind[k] for k in shape.kind_of_layer) or shape.num_layers * by_kind[0]
    return 4 * shape.axis_size("q") * keys


def training_flops_per_token(shape: Shape, seq_length: int, *, causal: bool = True) -> int:
    """Count the FLOPs of forward and backward pass per token; the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(shape, seq_length, causal=causal)
