"""What differs between layers, in config.json: windows, layers without rotary embedding or experts, read and written."""

from collections.abc import Mapping, Sequence
from typing import Any

from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.arch.table import Architecture
from minitron_train.hf.values import as_authors_give_it, size, spoken, truth
from minitron_train.runtime.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {  # whether such a layer has a window; "attention" is older
    FULL: False,
    "attention": False,
    SLIDING: True,
}


def read_layers(
    config: Mapping[str, Any], table: Architecture, rope: Rope, num_layers: int, where: str
) -> list[LayerKind]:
    """The kind of every layer.

    Raises:
        UserError: a key has a wrong type or length, or names a kind of layer that the family does not have.
    """
    stated = {**table.config_defaults, **config}
    slides = sliding_layers(stated, table, num_layers, where)
    width = window(stated, table, where) if any(slides) else None
    rotates = rotated_layers(stated, table, num_layers, where)
    dense = dense_layers(stated, table, num_layers, where)
    return [
        LayerKind(window=width if has_window else None, rope=rope if has_rope else None, is_dense=is_dense)
        for has_window, has_rope, is_dense in zip(slides, rotates, dense, strict=True)
    ]


def dense_layers(stated: Mapping[str, Any], table: Architecture, num_layers: int, where: str) -> list[bool]:
    """Whether each layer has a dense MLP instead of experts. `stated` has the family's defaults for missing keys."""
    rule = table.dense_layers
    if rule is None:
        return [False] * num_layers
    listed = [] if stated[rule.key] is None else stated[rule.key]
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        raise UserError(
            f"{where}: {rule.key}={spoken(listed)}: must be a list of layer numbers; {as_authors_give_it('it')}"
        )
    step, named = size(stated[rule.interval], rule.interval, where), set(listed)
    return [i in named or (i + 1) % step != 0 for i in range(num_layers)]


def dense_width(config: Mapping[str, Any], table: Architecture, kinds: Sequence[LayerKind], where: str) -> int:
    """Neurons of the MLP of dense layers among layers with experts; 0 if there are none."""
    rule = table.dense_layers
    if rule is None or not any(kind.is_dense for kind in kinds):
        return 0
    return size({**table.config_defaults, **config}[rule.width], rule.width, where)


def rotated_layers(stated: Mapping[str, Any], table: Architecture, num_layers: int, where: str) -> list[bool]:
    """Whether each layer has a rotary embedding. `stated` has the family's defaults for missing keys."""
    rule = table.unrotated
    if rule is None:
        return [True] * num_layers
    listed = stated[rule.key]
    if listed is None:
        size(stated[rule.interval], rule.interval, where)
    elif not isinstance(listed, list) or len(listed) < num_layers or not set(map(str, listed)) <= {"0", "1"}:
        raise UserError(
            f"{where}: {rule.key}={spoken(listed)}: must be a list of {num_layers} numbers, 0 for a layer without rotary "
            f"embedding and 1 for another one; {as_authors_give_it('it')}"
        )
    return [not rule.has(stated, i) for i in range(num_layers)]


def window(stated: Mapping[str, Any], table: Architecture, where: str) -> int:
    """Width of the sliding window, tokens."""
    width = stated["sliding_window"] if is_on(stated, table, where) else None
    if width is None:
        needed = "sliding_window" if table.windows.switch is None else f"{table.windows.switch} and sliding_window"
        raise UserError(f"{where}: layer_types holds {SLIDING!r}, but no window is set; {as_authors_give_it(needed)}")
    return size(width, "sliding_window", where)


def is_on(stated: Mapping[str, Any], table: Architecture, where: str) -> bool:
    """Whether the family's layers can have windows with this config."""
    switch = table.windows.switch
    return switch is None or truth(stated[switch], switch, where)


def sliding_layers(stated: Mapping[str, Any], table: Architecture, num_layers: int, where: str) -> list[bool]:
    """Whether each layer has a sliding window. `stated` has the family's defaults for missing keys."""
    rule, named = table.windows, layer_types(stated, table, num_layers, where)
    if rule.is_needed and stated["sliding_window"] is None:
        raise UserError(
            f"{where}: no window is set, and transformers' {table.hf_class} needs one; {as_authors_give_it('sliding_window')}"
        )
    if named is not None and rule.layer_types:
        return [LAYER_TYPES[kind] for kind in named]
    if not rule.layer_types and SLIDING in (named or ()):
        return [True] * num_layers
    if rule.default is None or not is_on(stated, table, where) or stated["sliding_window"] is None:
        return [False] * num_layers
    first = stated.get(rule.first_sliding or "", 0)
    if isinstance(first, bool) or not isinstance(first, int):
        raise UserError(
            f"{where}: {rule.first_sliding}={spoken(first)} is not a whole number; {as_authors_give_it('it')}"
        )
    return [rule.default(stated, i) for i in range(num_layers)]


def layer_types(stated: Mapping[str, Any], table: Architecture, num_layers: int, where: str) -> list[str] | None:
    """The checked value of layer_types, or None."""
    named = stated.get("layer_types")
    if named is None:
        return None
    if not isinstance(named, list) or len(named) != num_layers:
        raise UserError(
            f"{where}: layer_types={spoken(named)}: must be a list of {num_layers} names, one for each layer; "
            f"{as_authors_give_it('it')}"
        )
    supported = [kind for kind, slides in LAYER_TYPES.items() if not slides or table.windows.default is not None]
    for kind in named:
        if kind not in supported:
            raise UserError(
                f"{where}: layer_types holds {spoken(kind)}: only {', '.join(supported)} are supported for "
                f"{table.name}; use another teacher"
            )
    return named


def written_layers(
    config: Mapping[str, Any], table: Architecture, kinds: Sequence[LayerKind], *, is_listed: bool = False
) -> dict[str, Any]:
    """Keys that give a model's layers these kinds (their rope is written by `written_rope`).

    Args:
        config: the other keys of its config.json, which decide what a missing layer_types would mean.
        is_listed: write layer_types even where the other keys say the same.
    """
    keys: dict[str, Any] = {}
    if table.unrotated is not None:
        keys[table.unrotated.key] = [int(kind.rope is not None) for kind in kinds]
    if table.dense_layers is not None:
        keys[table.dense_layers.key] = [i for i, kind in enumerate(kinds) if kind.is_dense]
        keys[table.dense_layers.interval] = 1
    return keys | written_windows({**config, **keys}, table, kinds, is_listed=is_listed)


def written_windows(
    config: Mapping[str, Any], table: Architecture, kinds: Sequence[LayerKind], *, is_listed: bool
) -> dict[str, Any]:
    """Keys that give a model's layers their windows."""
    rule, slides = table.windows, [kind.window is not None for kind in kinds]
    if rule.default is None:
        return {}
    if not rule.layer_types:  # all layers are alike; a switch and its width stay as they are
        return {} if rule.switch is not None else {"sliding_window": kinds[0].window}
    keys: dict[str, Any] = {}
    if rule.first_sliding is not None:  # older readers know this key only
        keys[rule.first_sliding] = slides.index(True) if any(slides) else len(slides)
    without = {**table.config_defaults, **config, **keys, "layer_types": None}
    if is_listed or any(slides) or any(sliding_layers(without, table, len(kinds), "config.json")):
        keys["layer_types"] = [SLIDING if one else FULL for one in slides]
    return keys
