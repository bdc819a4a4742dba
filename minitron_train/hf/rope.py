"""Rotary embeddings in config.json: read as transformers 5 reads them, written for transformers 4 and 5.

Source: transformers.modeling_rope_utils (RotaryEmbeddingConfigMixin) and the families' RotaryEmbedding classes, 5.23.
"""

from collections.abc import Mapping
from typing import Any

from minitron_train.arch.layer_kind import Rope
from minitron_train.arch.table import ROPE_KEYS, Architecture
from minitron_train.hf.values import as_authors_give_it, positive_float, size, spoken
from minitron_train.runtime.errors import UserError

NEEDED = {  # keys without which transformers does not open the model
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
LENGTH = "original_max_position_embeddings"
WRITTEN = {  # kind of rope -> fields of Rope, and their keys in rope_scaling
    "default": {},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_length": LENGTH,
    },
}
PERCENT = "partial_rotary_factor"
OLD_PERCENTS = ("rope_percent", "rotary_percent", "rope_percentage")  # older names, which transformers 5 ignores


def rope_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys of config.json about rotary embeddings, which `written_rope` replaces."""
    return (ROPE_KEYS | {PERCENT, *OLD_PERCENTS}) & config.keys()


def written_rope(rope: Rope, table: Architecture) -> dict[str, Any]:
    """Keys of config.json that transformers 4 and 5 read alike.

    transformers 4 reads the top level. transformers 5 reads rope_scaling if it is not null, else rope_parameters, and
    takes missing keys from the top level.
    """
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    scaling |= {key: getattr(rope, field) for field, key in WRITTEN[rope.kind].items()}
    common = {"rope_theta": rope.theta} | ({PERCENT: rope.percent} if table.partial_rotary else {})
    return {
        "rope_parameters": {**scaling, **common},
        "rope_scaling": None if rope.kind == "default" else scaling,
        **common,
    }


def read_rope(config: Mapping[str, Any], table: Architecture, max_positions: int, head_dim: int, where: str) -> Rope:
    """The rotary embedding that transformers 5 builds from this config.json.

    Raises:
        UserError: the kind is not supported, a value is no number, or transformers itself does not open the config.
    """
    rope = stated(config, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in NEEDED:
        raise UserError(
            f"{where}: rope type {spoken(kind)} is not supported; supported: {', '.join(sorted(NEEDED))}; "
            "use another teacher"
        )
    for key in NEEDED[kind]:
        if key not in rope:
            raise UserError(f"{where}: rope type {kind!r} without {key}; {as_authors_give_it('it')}")
    factor = positive_float(rope["factor"], "the factor of rope_scaling", where) if kind != "default" else 1.0
    if kind == "linear":
        if factor != 1.0:
            raise UserError(
                f"{where}: linear rope scaling with factor={factor:g}: only 1 is supported; use another teacher"
            )
        kind, factor = "default", 1.0
    theta = rope["rope_theta"] if "rope_theta" in rope else config.get("rope_theta", table.rope_theta)
    return Rope(
        kind=kind,
        theta=positive_float(theta, "rope_theta", where),
        percent=read_percent(config, rope, table, head_dim, where),
        factor=factor,
        **(llama3_constants(config, rope, max_positions, where) if kind == "llama3" else {}),
    )


def stated(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The object that transformers reads: rope_scaling if it is not empty, else rope_parameters."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is not None and not isinstance(rope, Mapping):
            raise UserError(f"{where}: {key}={spoken(rope)} is not an object; {as_authors_give_it('it')}")
        if rope and any(isinstance(value, Mapping) for value in rope.values()):
            raise UserError(
                f"{where}: {key} holds one rotary embedding per type of layer: only one for all layers is supported; "
                "use another teacher"
            )
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def llama3_constants(
    config: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int, where: str
) -> dict[str, Any]:
    """llama3's constants other than the factor. As in transformers, the top level's pretraining length takes precedence."""
    low, high = (positive_float(rope[key], key, where) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise UserError(f"{where}: high_freq_factor={high:g}: must be above low_freq_factor={low:g}; correct them")
    length = config[LENGTH] if LENGTH in config else rope.get(LENGTH, max_positions)
    return {"low_freq_factor": low, "high_freq_factor": high, "original_length": size(length, LENGTH, where)}


def read_percent(
    config: Mapping[str, Any], rope: Mapping[str, Any], table: Architecture, head_dim: int, where: str
) -> float:
    """The share of each head's channels that transformers rotates.

    Families without partial rotary ignore the key with plain RoPE, and fail on it with scaled RoPE.
    """
    given = rope[PERCENT] if PERCENT in rope else config.get(PERCENT, table.rotary_percent)
    is_plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    is_ignored = not table.partial_rotary and (is_plain or given is None)
    percent = 1.0 if is_ignored else positive_float(given, PERCENT, where)
    num_rotated = int(head_dim * percent)
    if percent > 1 or num_rotated < 1:
        raise UserError(
            f"{where}: {PERCENT}={percent:g} rotates {num_rotated} of {head_dim} channels; set it between 0 and 1"
        )
    if num_rotated != head_dim and not table.partial_rotary:
        raise UserError(
            f"{where}: {PERCENT}={percent:g} with a scaled rope, with which transformers cannot run {table.name}; "
            "remove the key"
        )
    if num_rotated == head_dim and head_dim % 2:
        raise UserError(f"{where}: head_dim={head_dim}: fully rotated heads need an even number; use another teacher")
    for name in OLD_PERCENTS if table.partial_rotary else ():
        if name in config and config[name] != percent:
            raise UserError(
                f"{where}: {name}={spoken(config[name])}: transformers reads {PERCENT} alone, {percent:g} here; "
                f"write the right share as {PERCENT} and remove {name}"
            )
    return percent
