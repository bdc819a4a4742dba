"""Why a folder's tensors are not the model's: the true reason, and what to do about it."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minitron_train.arch.shape import Shape
from minitron_train.errors import UserError
from minitron_train.hf.dtypes import STORED_DTYPES
from minitron_train.hf.headers import Entry, shown

QUANTISED = {  # ends of tensor names -> who writes them
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight.absmax": "bitsandbytes, 4 bits",
    ".weight.quant_map": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or int8",
    "_blocks": "mxfp4",
    ".biases": "MLX",
    "._data": "quanto",
}
REMEDY = "take the model's unquantised checkpoint"
LAYER = re.compile(r"(.*\.)?layers\.(\d+)\.")


def quantisation(names: Collection[str], config: Mapping[str, Any]) -> str | None:
    """How the weights are quantised, by the names of tensors that only quantised models have; None if they are not."""
    for end, kind in QUANTISED.items():
        marked = next((name for name in names if name.endswith(end)), None)
        if marked:
            return f"its weights are quantised ({method(config) or kind}: {shown(marked)})"
    return None


def method(config: Mapping[str, Any]) -> str | None:
    """quant_method of config.json."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if isinstance(settings, Mapping):
            return shown(str(settings.get("quant_method") or key))
    return None


def missing_tensor(
    folder: Path, name: str, shape: Shape, tensors: Mapping[str, list[Entry]], config: Mapping[str, Any]
) -> UserError:
    """A tensor of the model is in no file."""
    again = "download the checkpoint again"
    if quantised := quantisation(tensors, config):
        return UserError(f"{folder}: {quantised}; {REMEDY}")
    if name.startswith("lm_head"):
        return UserError(
            f"{folder}: tensor {name} is missing and config.json does not tie it to the embedding; give a causal "
            "language model (a reward or embedding model has no output layer), or set tie_word_embeddings=true"
        )
    layer = LAYER.match(name)
    held = {int(found[2]) for found in map(LAYER.match, tensors) if found}
    if layer and held and int(layer[2]) not in held:
        return UserError(
            f"{folder}: tensor {name} is missing; {again}, or correct num_hidden_layers={shape.num_layers} in "
            f"config.json (layers {min(held)} to {max(held)} are stored)"
        )
    some = next(iter(tensors), None)
    if some and not any(stored.removeprefix("model.").startswith(("layers.", "embed_tokens")) for stored in tensors):
        return UserError(
            f"{folder}: tensor {name} is missing (tensors are named like {shown(some)}); take a causal LM's folder"
        )
    return UserError(f"{folder}: tensor {name} is missing; {again}")


def wrong_size(
    folder: Path,
    name: str,
    size: tuple[int, ...],
    entry: Entry,
    shape: Shape,
    tensors: Mapping[str, list[Entry]],
    config: Mapping[str, Any],
) -> UserError:
    """A tensor of another size than config.json says."""
    if quantised := quantisation(tensors, config):
        return UserError(f"{folder}: {quantised}; {REMEDY}")
    if entry.dtype not in STORED_DTYPES:
        return wrong_type(folder, entry, config)
    if len(entry.size) == 2 and entry.size[1:] == size[1:] and size[0] == shape.vocab_size:
        return UserError(
            f"{folder}: tensor {entry.name} has {entry.size[0]} rows, config.json says vocab_size={shape.vocab_size}; "
            f"set vocab_size={entry.size[0]} if the embedding was resized, otherwise download the checkpoint again"
        )
    return UserError(
        f"{folder}: tensor {name} has size {list(entry.size)}, config.json says {list(size)}; "
        "the folder mixes two models: copy config.json and weights from one of them"
    )


def wrong_type(folder: Path, entry: Entry, config: Mapping[str, Any]) -> UserError:
    """A tensor of a type that no training starts from: eight bits or fewer, or whole numbers."""
    by = f" (quantised with {method(config)})" if method(config) else ""
    supported = ", ".join(STORED_DTYPES)
    return UserError(f"{folder}: tensor {entry.name} has type {entry.dtype}{by}; supported: {supported}; {REMEDY}")
