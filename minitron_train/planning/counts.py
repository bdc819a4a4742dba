"""Parameters and floating-point operations, exact from the shapes."""

from math import prod
from typing import Any

from minitron_train.arch import Shape, architecture

MATRIX_PARTS = ("attention", "mlp", "output")  # multiplied with every token; the embedding is only looked up


def parameters(shape: Shape) -> dict[str, Any]:
    """Exact counts: all, all but embedding and output layer, and by part (tied weights count once)."""
    parts = architecture(shape.architecture).parameters(shape)
    total = sum(parts.values())
    return {
        "parameters": total,
        "non_embedding_parameters": total - parts["embedding"] - parts["output"],
        "parameters_by_part": parts,
    }


def parameters_per_rank(shape: Shape, tp: int) -> int:
    """Parameters that one tensor-parallel rank holds: cut matrices in `tp` parts, norms whole."""
    total = 0
    for row in architecture(shape.architecture).rows_of(shape):
        size = sum(prod(size) for size in row.sizes(shape).values())
        total += (size // tp if row.parallel_dim() is not None else size) * len(list(row.layers(shape)))
    return total


def layer_parameters(shape: Shape, tp: int = 1) -> int:
    """Parameters of one layer on one rank."""
    rows = [row for row in architecture(shape.architecture).rows_of(shape) if row.per_layer]
    sizes = [(sum(prod(size) for size in row.sizes(shape).values()), row.parallel_dim()) for row in rows]
    return sum(size if dim is None else size // tp for size, dim in sizes)


def forward_flops_per_token(shape: Shape, seq_length: int, *, causal: bool = True) -> int:
    """Multiply-adds count two. Matrices: 2 per parameter. Attention: Q K^T and P V against `seq_length` keys, half of them
    where the causal mask is made use of (the papers' own figures count all of them).
    """
    parts = architecture(shape.architecture).parameters(shape)
    matrices = sum(parts[name] for name in MATRIX_PARTS)
    if shape.tie_embeddings:
        matrices += parts["embedding"]  # the output layer multiplies with it
    keys = seq_length / 2 if causal else seq_length
    attention = 4 * shape.num_layers * shape.axis_size("q") * keys
    return int(2 * matrices + attention)


def training_flops_per_token(shape: Shape, seq_length: int, *, causal: bool = True) -> int:
    """Forward and backward: the backward pass costs two forwards."""
    return 3 * forward_flops_per_token(shape, seq_length, causal=causal)
