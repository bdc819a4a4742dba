"""Two rotary embeddings in one config.json: one for layers with a window, one for the others (Gemma 3, OLMo 3).

Source: convert_rope_params_to_dict of transformers' Gemma3TextConfig and Olmo3Config, 5.23. `rope_scaling` and the top level's
`rope_theta` belong to the layers without a window.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.arch.table import ROPE_KEYS, Architecture
from minitron_train.hf.layers import FULL, SLIDING
from minitron_train.hf.rope import LENGTH, an_object, given_rope, read_rope, written_rope
from minitron_train.hf.values import as_authors_give_it, spoken
from minitron_train.runtime.errors import UserError


def read_ropes(
    config: Mapping[str, Any], table: Architecture, max_positions: int, head_dim: int, where: str
) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers without and with a window; most families have one for both.

    Raises:
        UserError: see `read_rope`; or rope_parameters has not one object for each type of layer, or transformers ignores a key.
    """
    if table.local_rope is None:
        rope = read_rope(config, table, max_positions, head_dim, where)
        return rope, rope
    rest = {key: value for key, value in config.items() if key not in ROPE_KEYS - {LENGTH}}
    full, local = (
        read_rope({**rest, "rope_parameters": one}, table, max_positions, head_dim, where)
        for one in given_ropes(config, table, where)
    )
    if not (full.truncate and local.truncate):
        raise UserError(
            f"{where}: truncate=False: transformers ignores it where layers with a window have a rotary embedding of their "
            "own; use another teacher"
        )
    return full, local


def given_ropes(config: Mapping[str, Any], table: Architecture, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objects that transformers reads for layers without and with a window, of a family that has both."""
    assert table.local_rope is not None, f"{table.name} has one rotary embedding"
    nested = config.get("rope_parameters") or {}
    is_nested = isinstance(nested, Mapping) and all(
        key in (FULL, SLIDING) and isinstance(value, Mapping | None) for key, value in nested.items()
    )
    if not is_nested:
        raise UserError(
            f"{where}: rope_parameters={spoken(nested)}: {table.name} needs one object for {FULL} and one for {SLIDING}; "
            f"{as_authors_give_it('it')}"
        )
    full, local = ({"rope_type": "default"} | dict(nested.get(kind) or {}) for kind in (FULL, SLIDING))
    full |= an_object(config, "rope_scaling", where) or {}
    full.setdefault("rope_theta", config.get("rope_theta", table.rope_theta))
    local.setdefault("rope_theta", config.get(table.local_rope.key or "", table.local_rope.theta))
    return full, local


def written_ropes(
    ropes: tuple[Rope, Rope], config: Mapping[str, Any], table: Architecture, where: str
) -> dict[str, Any]:
    """Keys of config.json that give these ropes to layers without and with a window, for transformers 4 and 5.

    Args:
        config: the one that `read_ropes` made them from.
    """
    if table.local_rope is None:
        return written_rope(ropes[0], table, given_rope(config, table, where))
    given = given_ropes(config, table, where)
    keys, local = (written_rope(rope, table, one) for rope, one in zip(ropes, given, strict=True))
    keys["rope_parameters"] = {FULL: keys["rope_parameters"], SLIDING: local["rope_parameters"]}
    return keys | ({table.local_rope.key: ropes[1].theta} if table.local_rope.key else {})


def with_local_rope(kinds: list[LayerKind], local: Rope) -> list[LayerKind]:
    """`kinds`, those with a window and a rotary embedding with the rope `local`."""
    return [kind if kind.window is None or kind.rope is None else replace(kind, rope=local) for kind in kinds]
