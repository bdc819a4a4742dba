"""What this program can do with each family: the table that `families` prints and that README.md holds."""

from collections.abc import Iterable
from dataclasses import replace

from minitron_train.arch import ARCHITECTURES, Architecture, Shape, architecture
from minitron_train.arch.table import ROUTER, SHARED_GATE
from minitron_train.arch.wrappers import TEXTS, WRAPPERS, Wrapper

AXES = {
    "num_layers": "layers",
    "hidden_size": "hidden size",
    "ffn_hidden_size": "MLP",
    "num_attention_heads": "heads",
    "num_query_groups": "KV groups",
    "num_moe_experts": "experts",
    "moe_shared_expert_intermediate_size": "shared expert",
    "dense_ffn_hidden_size": "MLP of dense layers",
}
BEYOND = {  # model_type of a family that is not supported -> what it computes that no table describes, nearest family
    "gpt_oss": ("attention sinks, and experts with biases and clamped gates", "qwen3_moe"),
    "qwen3_next": ("gated delta networks in place of most attentions", "qwen3_moe"),
    "qwen3_5": ("gated delta networks in place of most attentions", "qwen3"),
    "qwen3_5_moe": ("gated delta networks in place of most attentions", "qwen3_moe"),
    "deepseek_v2": ("attention with compressed keys and values", "qwen2_moe"),
    "deepseek_v3": ("attention with compressed keys and values", "qwen3_moe"),
    "nemotron_h": ("Mamba layers", "nemotron"),
    "falcon_h1": ("Mamba next to each attention", "llama"),
    "glm4_moe": ("a router with corrected scores and groups of experts", "qwen3_moe"),
    "granitemoe": ("Granite with experts", "granite"),
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


def families_table() -> str:
    """All families as a table in Markdown: text models, then vision-language models around one of them."""
    alone = [table for table in ARCHITECTURES.values() if table not in TEXTS]
    rows = [HEADER, ("---",) * len(HEADER), *map(row_of, alone), *map(wrapper_row, WRAPPERS.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def wrapper_row(wrapper: Wrapper) -> tuple[str, ...]:
    """The cells of a vision-language model, whose text model is cut. Nothing rotates where its hidden size is fixed."""
    table = architecture(next(iter(wrapper.texts.values())))
    is_fixed = wrapper.hidden_size is not None
    return (
        f"{wrapper.models}: text model",
        f"`{wrapper.name}`",
        named(size for size in cut_alone(table) if size != "hidden_size") if is_fixed else axes(table),
        "no" if is_fixed else rotation(table),
        repair(table),
        tensor_parallelism(table),
        f"`{wrapper.hf_class}`",
    )


def row_of(table: Architecture) -> tuple[str, ...]:
    """One family's cells, in the order of HEADER."""
    return (
        table.models,
        f"`{table.name}`",
        axes(table),
        rotation(table),
        repair(table),
        tensor_parallelism(table),
        f"`{table.hf_class}`",
    )


def axes(table: Architecture) -> str:
    """The axes that can be cut; those that the family's loader accepts only together are named so."""
    alone = cut_alone(table)
    rest = [size for size in example(table).sizes() if size not in alone]
    if not rest:
        return "all"
    return f"{named(alone)}; {' and '.join(AXES.get(size, size) for size in rest)} together"


def cut_alone(table: Architecture) -> list[str]:
    """The sizes that can be cut alone."""
    whole = example(table)
    assert loads(table, whole), table.name
    return [size for size, value in whole.sizes().items() if loads(table, replace(whole, **{size: value // 2}))]


def example(table: Architecture) -> Shape:
    """A model of the family."""
    return Shape(
        architecture=table.name,
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=64,
        num_moe_experts=8 if table.has_experts else 0,
        moe_router_topk=2 if table.has_experts else 0,
        moe_shared_expert_intermediate_size=64 if table.has_shared_expert else 0,
    )


def loads(table: Architecture, shape: Shape) -> bool:
    """Whether the family's class in transformers accepts a shape."""
    return not any(rule(shape) for rule in table.rules)


def named(sizes: Iterable[str]) -> str:
    """Names of axes, for a reader."""
    return ", ".join(AXES.get(size, size) for size in sizes)


def rotation(table: Architecture) -> str:
    """Whether the residual stream can be rotated (pruning.basis.why_not also looks at the weights)."""
    if table.has_post_norms:
        return "no"
    return "where untied" if table.transformer["normalization"] == "LayerNorm" else "yes"


def repair(table: Architecture) -> str:
    """Which halves of a layer have the linears that the repair fits."""
    linears = {row.mcore for row in table.rows}
    mlp = "experts.{e}.linear_fc1" if table.has_experts else "mlp.linear_fc1"
    fitted = [half for half, name in (("attention", "linear_qkv"), ("MLP", mlp)) if any(name in row for row in linears)]
    return "yes" if len(fitted) == 2 else " and ".join(fitted)


def tensor_parallelism(table: Architecture) -> str:
    """Whether every matrix is split over the ranks; router and gate are small, and each rank holds them."""
    small = (ROUTER, SHARED_GATE)
    matrices = [row for row in table.rows if max(map(len, row.hf.values())) > 1 and row.mcore not in small]
    split = all(row.parallel_dim() is not None for row in matrices)
    return "yes" if split else "no"
