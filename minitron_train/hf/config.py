"""Reads config.json of a Hugging Face folder into a Shape, and writes a student's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitron_train.arch import ARCHITECTURES, Shape, architecture
from minitron_train.arch.families import BEYOND
from minitron_train.arch.mistral import WITH_LAYER_TYPES
from minitron_train.arch.shape import FACTORS
from minitron_train.arch.table import COMMON_FACTS, HARMLESS_KEYS, Architecture
from minitron_train.arch.wrappers import TEXTS
from minitron_train.hf.dtypes import named_dtype
from minitron_train.hf.layers import dense_width, read_layers, written_layers
from minitron_train.hf.local_rope import read_ropes, with_local_rope, written_ropes
from minitron_train.hf.rope import rope_keys
from minitron_train.hf.values import as_authors_give_it, epsilon, positive_number, size, spoken, truth
from minitron_train.hf.wrapped import FOLDER_KEYS, bound_layers, text_config, wrapped_student, wrapper_of
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.records import decode, read_bytes

MAX_LAYERS = 10_000  # far above any model; limits the table of tensors that a damaged config could ask for
MAX_EXPERTS = 10_000  # likewise, per layer
READERS: dict[str, Callable[[Any, str, str], Any]] = {  # parsers of Shape fields; other fields are sizes
    "num_layers": lambda value, key, where: size(value, key, where, MAX_LAYERS),
    "tie_embeddings": truth,
    "attention_bias": truth,
    "mlp_bias": truth,
    **dict.fromkeys(FACTORS, positive_number),
    "layernorm_epsilon": epsilon,
    "num_moe_experts": lambda value, key, where: size(value, key, where, MAX_EXPERTS),
    "norm_topk_prob": truth,
}
ONLINE = {  # quantisation methods that quantise plain weights in every forward pass of transformers
    "bitnet": "transformers quantises weights and activations while it computes",
}
OLD_HEAD_DIM = "kv_channels"  # NVIDIA's name for head_dim; transformers does not open such folders
UNTRUE_KEYS = FOLDER_KEYS | {  # keys of a teacher's config.json that would be wrong in its student's
    *("_commit_hash", "pretraining_tp", "torch_dtype", "dtype", "layer_types", "max_window_layers", OLD_HEAD_DIM)
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; a missing or damaged file is a UserError."""
    try:
        return decode(read_bytes(path), dict[str, Any], str(path), "correct it, or copy the file again")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a Hugging Face checkpoint") from None


def shape_from_config(config: Mapping[str, Any], where: str) -> Shape:
    """Read a Shape from config.json, with the defaults and precedence of transformers 5.

    Raises:
        UserError: the architecture or a feature is not supported, a required key is missing, or a value has a wrong type.
    """
    wrapper = wrapper_of(config)
    if wrapper is not None:
        check_quantisation(config, where)
        shape = shape_of_text(text_config(config, wrapper, where), where)
        return replace(shape, wrapper=wrapper.name, num_bound_layers=bound_layers(config))
    if config.get("model_type") in [table.name for table in TEXTS]:
        raise unsupported(config, where)
    name = config.get("model_type")
    if "layer_types" in config and isinstance(name, str) and name in WITH_LAYER_TYPES:
        config = {**config, "model_type": WITH_LAYER_TYPES[name].name}
    return shape_of_text(config, where)


def shape_of_text(config: Mapping[str, Any], where: str) -> Shape:
    """`shape_from_config` of a text model."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise unsupported(config, where)
    table = architecture(name)
    check_facts(config, table, where)
    check_aliases(config, table, where)
    check_quantisation(config, where)
    values = read_fields(config, table, where)
    check_padding(config, values["vocab_size"], where)
    rope, local = read_ropes(config, table, values["max_position_embeddings"], values["kv_channels"], where)
    layers = with_local_rope(read_layers(config, table, rope, values["num_layers"], where), local)
    values["dense_ffn_hidden_size"] = dense_width(config, table, layers, where)
    shape = Shape(architecture=table.name, **values, **table.shape_facts).with_layers(layers)
    shape.check(f"{where}: ", table.config_keys)
    return shape


def unsupported(config: Mapping[str, Any], where: str) -> UserError:
    """The error for a model_type without a table."""
    name = config.get("model_type")
    why, nearest = BEYOND.get(name, ("", "")) if isinstance(name, str) else ("", "")
    reason = f" ({why}); the nearest supported family is {nearest}" if why else ""
    return UserError(
        f"{where}: model_type {spoken(name)} is not supported{reason}; "
        "`python -m minitron_train families` lists the supported ones"
    )


def check_facts(config: Mapping[str, Any], table: Architecture, where: str) -> None:
    """Reject values of keys that change the logits, if they are not supported."""
    for key, supported in {**COMMON_FACTS, **table.config_facts}.items():
        if key in config and config[key] not in supported:
            raise UserError(
                f"{where}: {key}={spoken(config[key])}: only {' or '.join(map(spoken, supported))} is supported for "
                f"{table.name}; use another teacher"
            )


def check_aliases(config: Mapping[str, Any], table: Architecture, where: str) -> None:
    """Reject a key and its alias with two values: the one that transformers takes depends on their order."""
    for key, alias in table.config_aliases.items():
        if key in config and alias in config and config[key] != config[alias]:
            raise UserError(
                f"{where}: {key}={spoken(config[key])} and {alias}={spoken(config[alias])} are one setting with two "
                f"values; {as_authors_give_it('it')}"
            )


def check_quantisation(config: Mapping[str, Any], where: str) -> None:
    """Reject plain weights that transformers quantises in every forward pass.

    Other methods are ignored here: either the quantisation was undone, or the tensors are rejected by their type.
    """
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if isinstance(method, str) and method in ONLINE:
        raise UserError(
            f"{where}: quantization_config names {method}, with which {ONLINE[method]}: not supported; use another teacher"
        )


def check_padding(config: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Reject a pad_token_id outside the vocabulary: transformers opens neither such a model nor its student."""
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and not -vocab_size <= pad < vocab_size:
        raise UserError(
            f"{where}: pad_token_id={spoken(pad)}: transformers opens no model with an id beyond vocab_size={vocab_size}; "
            "set it to null, or to a token of the vocabulary"
        )


def read_fields(config: Mapping[str, Any], table: Architecture, where: str) -> dict[str, Any]:
    """Read the Shape fields that have a key of their own; a missing key gets transformers' default."""
    values: dict[str, Any] = {}
    for field, key in table.config_keys.items():
        value = stated(config, key, table)
        if value is not None:
            values[field] = READERS.get(field, size)(value, key, where)
        elif key not in table.config_nullable and (key in config or key not in table.config_defaults):
            raise UserError(f"{where}: the key {key!r} is missing or null; {as_authors_give_it('it')}")
    values.setdefault("num_query_groups", values["num_attention_heads"])
    if "kv_channels" not in values:
        values["kv_channels"] = values["hidden_size"] // values["num_attention_heads"]
    return values


def stated(config: Mapping[str, Any], key: str, table: Architecture) -> Any:
    """The value of a key, or transformers' default if it is missing; None if it is derived from others, or unknown."""
    if key == "head_dim" and config.get(key) is None and table.partial_rotary and OLD_HEAD_DIM in config:
        return config[OLD_HEAD_DIM]
    alias = table.config_aliases.get(key)
    if alias is not None and alias in config:  # equal to the key, if both are there
        return config[alias]
    return config.get(key, table.config_defaults.get(key))


def student_config(
    config: Mapping[str, Any],
    shape: Shape,
    dtype: torch.dtype | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The teacher's config.json with the sizes of `shape`, for transformers 4 and 5, without keys that would be wrong.

    transformers_version is kept: it names the version that wrote the tokenizer's files, and transformers 5 uses it to
    decide whether a Mistral tokenizer needs a correction.

    Args:
        dtype: number type of the student's tensors; None: the one in the teacher's config.json, if any.
        layers: the teacher's layers that the student keeps, ascending; None: the first ones.
    """
    table, where = architecture(shape.architecture), "config.json"
    teacher = shape_from_config(config, where)
    kept = list(range(shape.num_layers) if layers is None else layers)
    assert len(kept) == shape.num_layers, f"{len(kept)} layers kept, {shape.num_layers} planned"
    if (wrapper := wrapper_of(config)) is not None:
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        return wrapped_student(config, wrapper, table, shape, kept, named)
    dropped = UNTRUE_KEYS | rope_keys(config)
    changed = {
        key: cut(key, value, table, teacher.num_layers, kept) for key, value in config.items() if key not in dropped
    }
    changed |= {key: getattr(shape, field) for field, key in table.config_keys.items()}
    if shape.dense_ffn_hidden_size and table.dense_layers is not None:
        changed[table.dense_layers.width] = shape.dense_ffn_hidden_size
    changed |= {alias: changed[key] for key, alias in table.config_aliases.items() if alias in config}
    ropes = read_ropes(config, table, teacher.max_position_embeddings, teacher.kv_channels, where)
    changed |= written_ropes(ropes, config, table, where)
    is_listed = config.get("layer_types") is not None
    changed |= written_layers(changed, table, [teacher.layer_kinds[i] for i in kept], is_listed=is_listed)
    changed |= {"model_type": table.name, "architectures": [table.hf_class]}
    stored = named_dtype(config) if dtype is None else str(dtype).removeprefix("torch.")
    if stored is not None:
        changed |= {"dtype": stored, "torch_dtype": stored}  # transformers 5 and 4
    return changed


def cut(key: str, value: Any, table: Architecture, num_layers: int, kept: Sequence[int]) -> Any:
    """The student's value of a key: a list with one entry per layer, under an unknown key, keeps the kept layers' entries."""
    known = HARMLESS_KEYS | table.config_facts.keys() | table.config_read | set(table.config_keys.values())
    if key in known or not isinstance(value, list) or len(value) != num_layers or len(kept) == num_layers:
        return value
    return [value[i] for i in kept]


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for transformers 4 and 5: class and special tokens get the names that version 4 knows.

    auto_map is dropped, because code of the teacher's folder is not copied. Keys that locate the folder are dropped too.
    """
    untrue = ("auto_map", "name_or_path", "_commit_hash", "is_local", "local_files_only")
    portable = {key: value for key, value in config.items() if key not in untrue}
    if isinstance(portable.get("extra_special_tokens"), list):  # transformers 4 wants a dictionary under this key
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    return portable
