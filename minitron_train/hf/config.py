"""config.json of a Hugging Face folder: read into a Shape, and written for a student."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from minitron_train.arch import ARCHITECTURES, Shape, architecture
from minitron_train.errors import UserError

KINDS: dict[str, Any] = {field.name: field.type for field in fields(Shape)}
LEGACY_KEYS = {  # older names of config.json keys, newest first
    "partial_rotary_factor": ("rope_percent", "rotary_percent", "rope_percentage"),
    "head_dim": ("kv_channels",),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a Hugging Face checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; copy the file again")
    return value


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """A key of config.json, in today's place (rope_parameters), else at the top level, or under an older name."""
    rope = config.get("rope_parameters")
    places = (rope, config) if isinstance(rope, Mapping) else (config,)
    for name in (key, *LEGACY_KEYS.get(key, ())):
        for place in places:
            if place.get(name) is not None:
                return place[name]
    return None


def shape_from_config(config: Mapping[str, Any], where: str) -> Shape:
    """Read a Shape off config.json.

    Raises:
        UserError: unsupported architecture or feature, or a needed key that is missing.
    """
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{where}: model_type {name!r} is not supported; supported architectures: {supported}")
    table = architecture(str(name))
    values: dict[str, Any] = dict.fromkeys(table.config_keys)
    for field, key in table.config_keys.items():
        if (value := lookup(config, key)) is not None:
            values[field] = number(value, key, where, KINDS[field])
    values["num_query_groups"] = values["num_query_groups"] or values["num_attention_heads"]
    if values["kv_channels"] is None and values["hidden_size"] and values["num_attention_heads"]:
        values["kv_channels"] = values["hidden_size"] // values["num_attention_heads"]
    for field, key in table.config_keys.items():
        if values[field] is None:
            raise UserError(f"{where}: the key {key!r} is missing; add it as the model's authors give it")
    for key, wanted in table.config_facts.items():
        if (given := config.get(key, table.config_defaults.get(key))) not in (wanted, None):
            silent = "" if key in config else ", which transformers assumes where the key is missing"
            raise UserError(
                f"{where}: {key}={given!r}{silent}: only {wanted!r} is supported for {name}; use another teacher"
            )
    percent, base = lookup(config, "partial_rotary_factor"), lookup(config, "rope_theta")
    shape = Shape(
        architecture=table.name,
        rotary_percent=table.rotary_percent if percent is None else number(percent, "partial_rotary_factor", where),
        rotary_base=10000.0 if base is None else number(base, "rope_theta", where),
        rope_scaling_factor=rope_scaling_factor(config, where),
        **values,
    )
    shape.check(where)
    return shape


def number(value: Any, key: str, where: str, kind: type = float) -> Any:
    """A value of config.json as the number that it must be.

    Raises:
        UserError: it is none, or not a whole one where `kind` is int.
    """
    is_number = isinstance(value, int | float) and (kind is bool or not isinstance(value, bool))
    if not is_number or not math.isfinite(value) or (kind is int and value != int(value)):
        whole = "whole " if kind is int else ""
        raise UserError(f"{where}: {key}={value!r} is not a {whole}number; set it as the model's authors give it")
    return kind(value)


def rope_scaling_factor(config: Mapping[str, Any], where: str) -> float | None:
    """Llama 3.1's scaling factor; None without scaling. Other kinds of scaling are refused."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        raise UserError(f"{where}: {key}={rope!r} is not an object; set it as the model's authors give it")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, llama3")
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for key, wanted in fixed.items():
        if rope.get(key, wanted) != wanted:
            raise UserError(f"{where}: llama3 rope scaling with {key}={rope[key]}: only {wanted} is supported")
    return number(rope.get("factor"), "the factor of rope_scaling", where)


def student_config(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The teacher's config.json with the sizes of `shape`; every other key stays."""
    table = architecture(shape.architecture)
    changed = dict(config) | {key: getattr(shape, field) for field, key in table.config_keys.items()}
    changed["architectures"] = [table.hf_class]
    changed.pop("layer_types", None)  # one entry per layer; without sliding windows its default is right
    if dtype is not None:
        changed.pop("torch_dtype", None)
        changed["dtype"] = str(dtype).removeprefix("torch.")
    return changed
