"""Rotary embeddings in config.json: read as transformers 5 reads them, written for transformers 4 and 5.

Source: transformers.modeling_rope_utils (RotaryEmbeddingConfigMixin) and the families' RotaryEmbedding classes, 5.23.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minitron_train.arch.layer_kind import Rope
from minitron_train.arch.table import ROPE_KEYS, Architecture
from minitron_train.hf.values import as_authors_give_it, positive_float, size, spoken, truth
from minitron_train.runtime.errors import UserError

LENGTH = "original_max_position_embeddings"  # in pretraining, tokens
PERCENT = "partial_rotary_factor"
OLD_PERCENTS = ("rope_percent", "rotary_percent", "rope_percentage")  # older names, which transformers 5 ignores


@dataclass(frozen=True, slots=True)
class Stated:
    """The object of config.json that describes one rope, with what transformers takes from the top level."""

    values: Mapping[str, Any]
    length: Any  # in pretraining, tokens; unchecked
    max_positions: int
    num_frequencies: int
    where: str

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. A missing value, or null, is `default`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if key not in self.values:
            kind = self.values.get("rope_type", self.values.get("type", "default"))
            raise UserError(f"{self.where}: rope type {spoken(kind)} without {key}; {as_authors_give_it('it')}")
        return positive_float(value, f"{key} of rope_scaling" if key == "factor" else key, self.where)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list with a number above 0 for each frequency."""
        given = self.values.get(key)
        if not isinstance(given, list) or len(given) != self.num_frequencies:
            raise UserError(
                f"{self.where}: {key}={spoken(given)}: must be a list of {self.num_frequencies} numbers, one for each "
                f"frequency; {as_authors_give_it('it')}"
            )
        return tuple(positive_float(value, key, self.where) for value in given)

    def pretraining_length(self) -> int:
        """Longest sequence in pretraining, tokens."""
        return size(self.length, LENGTH, self.where)


def llama3(stated: Stated) -> dict[str, Any]:
    """Llama 3.1's constants."""
    factor, low, high = (stated.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise UserError(
            f"{stated.where}: high_freq_factor={high:g}: must be above low_freq_factor={low:g}; correct them"
        )
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_length": stated.pretraining_length(),
    }


def yarn(stated: Stated) -> dict[str, Any]:
    """YaRN's constants (arXiv 2309.00071); the attention factor follows from the factor unless it is given."""
    length, factor = stated.pretraining_length(), stated.values.get("factor", 0)
    factor = stated.max_positions / length if factor is None else stated.number("factor")
    given = [stated.values.get(key) for key in ("mscale", "mscale_all_dim")]
    above, below = (stated.number("mscale"), stated.number("mscale_all_dim")) if all(given) else (1.0, 0.0)

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return {
        "factor": factor,
        "original_length": length,
        "attention_factor": stated.number("attention_factor", growth(above) / growth(below)),
        "beta_fast": stated.number("beta_fast", 32.0) if stated.values.get("beta_fast") else 32.0,
        "beta_slow": stated.number("beta_slow", 1.0) if stated.values.get("beta_slow") else 1.0,
        "truncate": truth(stated.values.get("truncate", True), "truncate", stated.where),
    }


def longrope(stated: Stated) -> dict[str, Any]:
    """LongRoPE's factors (arXiv 2402.13753); the attention factor follows from the factor unless it is given."""
    length = stated.pretraining_length()
    factor = stated.number("factor", stated.max_positions / length)
    growth = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 and length > 1 else 1.0
    return {
        "factor": factor,
        "original_length": length,
        "attention_factor": stated.number("attention_factor", growth),
        "short_factors": stated.numbers("short_factor"),
        "long_factors": stated.numbers("long_factor"),
    }


CONSTANTS: dict[str, Callable[[Stated], dict[str, Any]]] = {  # rope type -> fields of Rope
    "default": lambda _: {},
    "linear": lambda stated: {"factor": stated.number("factor")},
    "dynamic": lambda stated: {"factor": stated.number("factor")},
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}
EVEN = ("yarn", "longrope")  # rope types that transformers computes only for an even number of channels
WITH_LENGTH = ("llama3", "yarn", "longrope")  # rope types for which transformers completes the pretraining length


def rope_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys of config.json about rotary embeddings, which `written_rope` replaces.

    The pretraining length at the top level stays: it takes precedence, so it is the one that was read.
    """
    return (ROPE_KEYS - {LENGTH} | {PERCENT, *OLD_PERCENTS}) & config.keys()


def written_rope(rope: Rope, table: Architecture, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json that transformers 4 and 5 read alike.

    transformers 4 reads the top level. transformers 5 reads rope_scaling if it is not null, else rope_parameters, and
    takes missing keys from the top level.

    Args:
        given: the object of config.json from which `read_rope` made `rope`; empty for a new model.
    """
    own = {"type", "rope_type", "rope_theta", PERCENT, *OLD_PERCENTS}
    constants = {key: value for key, value in given.items() if key not in own and value is not None}
    scaling: dict[str, Any] = {"rope_type": rope.kind, **constants}
    if table.query_growth is not None:
        scaling[table.query_growth] = rope.query_growth
    if rope.kind in WITH_LENGTH or table.query_growth:
        scaling[LENGTH] = rope.original_length
    if rope.kind == "yarn":
        scaling["factor"] = rope.factor  # null in config.json: the ratio of the lengths
    is_plain = rope.kind == "default" and table.query_growth is None
    common = {"rope_theta": rope.theta} | ({PERCENT: rope.percent} if table.partial_rotary else {})
    return {
        "rope_parameters": ({"rope_type": rope.kind} if is_plain else scaling) | common,
        "rope_scaling": None if is_plain else scaling,
        **common,
    }


def read_rope(config: Mapping[str, Any], table: Architecture, max_positions: int, head_dim: int, where: str) -> Rope:
    """The rotary embedding that transformers 5 builds from this config.json.

    Raises:
        UserError: the kind is not supported, a value is no number, or transformers itself does not open the config.
    """
    rope = given_rope(config, table, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    supported = {name: name for name in CONSTANTS} if table.rope_types is None else table.rope_types
    if not isinstance(kind, str) or kind not in supported:
        raise UserError(
            f"{where}: rope type {spoken(kind)} is not supported for {table.name}; supported: "
            f"{', '.join(sorted(supported))}; use another teacher"
        )
    kind = supported[kind]
    theta = rope["rope_theta"] if "rope_theta" in rope else config.get("rope_theta", table.rope_theta)
    theta = positive_float(theta, "rope_theta", where)
    if kind == "yarn" and theta == 1:
        raise UserError(f"{where}: rope_theta=1, by whose logarithm YaRN divides; {as_authors_give_it('it')}")
    percent = read_percent(config, rope, table, head_dim, where)
    num_rotated = int(head_dim * percent)
    if (kind in EVEN or table.rotates_pairs_only) and num_rotated % 2:
        needs = table.hf_class if table.rotates_pairs_only else f"rope type {kind!r}"
        raise UserError(
            f"{where}: {PERCENT}={percent:g} rotates {num_rotated} of {head_dim} channels: {needs} needs an "
            "even number; use another teacher"
        )
    top = {**table.config_defaults, **config}
    length = top[LENGTH] if LENGTH in top else rope.get(LENGTH, max_positions)
    stated = Stated(rope, length, max_positions, len(range(0, num_rotated, 2)), where)
    return Rope(
        kind=kind,
        theta=theta,
        percent=percent,
        **CONSTANTS[kind](stated) | query_growth(stated, table, kind),
    )


def an_object(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any] | None:
    """The value of a key, which is an object, or null or missing."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{where}: {key}={spoken(value)} is not an object; {as_authors_give_it('it')}")
    return value


def given_rope(config: Mapping[str, Any], table: Architecture, where: str) -> Mapping[str, Any]:
    """The object that transformers reads: rope_scaling if it is not empty, else rope_parameters, else the family's."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = an_object(config, key, where)
        if rope and any(isinstance(value, Mapping) for value in rope.values()):
            raise UserError(
                f"{where}: {key} holds one rotary embedding per type of layer: only one for all layers is supported; "
                "use another teacher"
            )
    rope = config.get("rope_parameters")
    return config.get("rope_scaling") or (table.config_defaults.get("rope_parameters", {}) if rope is None else rope)


def query_growth(stated: Stated, table: Architecture, kind: str) -> dict[str, Any]:
    """How queries grow with their position (Llama 4's attention temperature), for families that have it."""
    if table.query_growth is None:
        return {}
    length = stated.length if kind in WITH_LENGTH else stated.values.get(LENGTH)
    growth = 0.0 if stated.values.get(table.query_growth) == 0 else stated.number(table.query_growth)
    return {"query_growth": growth, "original_length": size(length, LENGTH, stated.where)}


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
