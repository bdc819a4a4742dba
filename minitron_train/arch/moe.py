"""Mixtures of experts: the rows that replace the MLP's, those of dense layers among them, and their keys of config.json."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from minitron_train.arch.shape import Shape
from minitron_train.arch.table import EXPERT, HF, ROUTER, SHARED, SHARED_GATE, ParamSpec


def moe_rows(rows: Iterable[ParamSpec], router: str, expert: str, gate: str, up: str, down: str) -> Iterator[ParamSpec]:
    """Replace the dense MLP of a table's rows by a router and experts.

    Args:
        router, expert: Hugging Face names inside a layer; `expert` is a prefix with `{e}`.
        gate, up, down: Hugging Face names of an expert's linears.
    """
    for row in rows:
        if ".mlp." not in row.mcore:
            yield row
    yield ParamSpec(mcore=ROUTER, hf={f"{HF}{router}.weight": ("expert", "embd")})
    first = {f"{HF}{expert}{name}.weight": ("ffn", "embd") for name in (gate, up)}
    yield ParamSpec(mcore=EXPERT + "linear_fc1.weight", hf=first)
    yield ParamSpec(mcore=EXPERT + "linear_fc2.weight", hf={f"{HF}{expert}{down}.weight": ("embd", "ffn")})


def mixed_rows(rows: Iterable[ParamSpec], dense: Iterable[ParamSpec]) -> Iterator[ParamSpec]:
    """Rows of a mixture of experts in which some layers have the MLP of the table `dense` instead."""
    for row in rows:
        yield replace(row, dense=False) if ".mlp." in row.mcore else row
    for row in dense:
        if ".mlp." in row.mcore:
            hf = {name: tuple("dense" if axis == "ffn" else axis for axis in axes) for name, axes in row.hf.items()}
            yield replace(row, hf=hf, dense=True)


def shared_rows(expert: str, gate: str) -> tuple[ParamSpec, ...]:
    """The rows of a shared expert, and of the gate that its output is multiplied by: one number for each token.

    Args:
        expert, gate: Hugging Face names inside a layer; `expert` is a prefix.
    """
    first = {f"{HF}{expert}{name}.weight": ("shared", "embd") for name in ("gate_proj", "up_proj")}
    return (
        ParamSpec(mcore=SHARED_GATE, hf={f"{HF}{gate}.weight": ("one", "embd")}),
        ParamSpec(mcore=SHARED + "linear_fc1.weight", hf=first),
        ParamSpec(mcore=SHARED + "linear_fc2.weight", hf={f"{HF}{expert}down_proj.weight": ("embd", "shared")}),
    )


def moe_config_keys(
    dense: Mapping[str, str], *, width: str, experts: str = "num_experts", normalised: str | None = None
) -> dict[str, str]:
    """Add the keys of a mixture of experts; `normalised` is None where the family always normalises probabilities."""
    keys = {"ffn_hidden_size": width, "num_moe_experts": experts, "moe_router_topk": "num_experts_per_tok"}
    return {**dense, **keys} | ({"norm_topk_prob": normalised} if normalised else {})


def experts_are_given(shape: Shape) -> str | None:
    """A family of mixtures of experts has no dense model."""
    return None if shape.num_moe_experts else "num_moe_experts=0, but this family has experts"


def rows_fill_products(shape: Shape) -> str | None:
    """transformers multiplies all experts at once, with products that take rows of 16 bytes: 8 numbers in bf16."""
    for key in ("hidden_size", "ffn_hidden_size"):
        if getattr(shape, key) % 8:
            return f"{key}={getattr(shape, key)} must be a multiple of 8, or its products of all experts at once fail"
    return None


MOE_RULES = (experts_are_given, rows_fill_products)
