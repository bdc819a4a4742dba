"""What this program can do with each family: the table that `families` prints and that README.md holds."""

from collections.abc import Iterable
from dataclasses import replace

from minitron_train.arch import ARCHITECTURES, Architecture, Shape
from minitron_train.arch.shape import SIZES
from minitron_train.arch.table import LAYER, READ_NORMS

AXES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "MLP",
    "num_attention_heads": "heads",
    "num_query_groups": "KV groups",
}
HEADER = (
    "family",
    "`model_type`",
    "axes that can be cut",
    "rotation",
    "repair",
    "tensor parallelism",
    "exported class",
)
PROBE = {  # a shape that every family accepts, and with each of its axes halved
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
}


def families_table() -> str:
    """All families as a table in Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *(row_of(table) for table in ARCHITECTURES.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def row_of(table: Architecture) -> tuple[str, ...]:
    """One family's cells, in the order of HEADER."""
    return (
        table.models or table.hf_class.removesuffix("ForCausalLM"),
        f"`{table.name}`",
        axes(table),
        rotation(table),
        repair(table),
        tensor_parallelism(table),
        f"`{table.hf_class}`",
    )


def axes(table: Architecture) -> str:
    """The axes that can be cut; those that the family's loader accepts only together are named so."""
    whole = Shape(architecture=table.name, kv_channels=8, vocab_size=64, **PROBE)
    assert loads(table, whole), table.name
    alone = [size for size in SIZES if loads(table, replace(whole, **{size: PROBE[size] // 2}))]
    rest = [size for size in SIZES if size not in alone]
    if not rest:
        return "all"
    assert loads(table, replace(whole, **{size: PROBE[size] // 2 for size in rest})), table.name
    return f"{named(alone)}; {' and '.join([AXES.get(size, size) for size in rest])} together"


def loads(table: Architecture, shape: Shape) -> bool:
    """Whether the family's class in transformers accepts a shape."""
    return not any(rule(shape) for rule in table.rules)


def named(sizes: Iterable[str]) -> str:
    """Names of axes, for a reader."""
    return ", ".join(AXES.get(size, size) for size in sizes)


def rotation(table: Architecture) -> str:
    """Whether the residual stream can be rotated (pruning.basis.why_not also looks at the weights)."""
    return "where untied" if table.transformer["normalization"] == "LayerNorm" else "yes"


def repair(table: Architecture) -> str:
    """Which halves of a layer have the linears that the repair fits."""
    linears = {row.mcore for row in table.rows}
    fitted = [half for half, norm in (("attention", "linear_qkv"), ("MLP", "linear_fc1")) if first(norm) in linears]
    return "yes" if len(fitted) == 2 else " and ".join(fitted)


def first(linear: str) -> str:
    """Full name of the linear that reads a half's norm."""
    return next(name for name in READ_NORMS if name.startswith(LAYER) and f".{linear}." in name)


def tensor_parallelism(table: Architecture) -> str:
    """Whether every matrix of a layer is split over the ranks."""
    split = all(row.parallel_dim() is not None for row in table.rows if max(map(len, row.hf.values())) > 1)
    return "yes" if split else "no"
