"""Messages for folders whose tensors do not match the model: the likely cause and the remedy."""

import re
from collections.abc import Collection, Mapping
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape, architecture
from minitron_train.hf.dtypes import STORED_DTYPES
from minitron_train.hf.headers import Entry, shown
from minitron_train.runtime.errors import UserError

QUANTISED = {  # suffix of a tensor's name -> the quantisation method that writes it
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
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".weight_scales": "EETQ",
    ".bitmask": "compressed-tensors, sparse",
    ".dense_weights": "SpQR",
}
REMEDY = "take the model's unquantised checkpoint"
ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|original_module|modules_to_save)\b")  # PEFT's names
LAYER = re.compile(r"(.*\.)?layers\.(\d+)\.")


def quantisation(names: Collection[str], config: Mapping[str, Any]) -> str | None:
    """How the weights are quantised, by the names of their tensors or by config.json; None if neither indicates it.

    Call it only if the tensors do not match the model: config.json may keep the settings of a quantisation that was undone.
    """
    for end, kind in QUANTISED.items():
        marked = next((name for name in names if name.endswith(end)), None)
        if marked:
            return f"its weights are quantised ({method(config) or kind}: {shown(marked)})"
    return f"its weights are quantised, as config.json says ({method(config)})" if method(config) else None


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
    """The error for a tensor of the model that is in no file."""
    again = "download the checkpoint again"
    if quantised := quantisation(tensors, config):
        return UserError(f"{folder}: {quantised}; {REMEDY}")
    if adapter := next(filter(ADAPTER.search, tensors), None):
        return UserError(
            f"{folder}: tensor {name} is missing, and {shown(adapter)} belongs to an adapter that was not merged; "
            "merge it with merge_and_unload and save_pretrained"
        )
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
    if wrapped := next(
        (stored for stored in tensors if is_embedding(name) and stored.endswith(f".{bare(name)}")), None
    ):
        return UserError(
            f"{folder}: tensor {name} is stored as {shown(wrapped)}: the model was saved inside another one "
            "(torch.compile, DDP, PEFT, a multimodal model); save the language model alone with save_pretrained"
        )
    some = next(iter(tensors), None)
    if some and not any(stored.removeprefix("model.").startswith(("layers.", "embed_tokens")) for stored in tensors):
        return UserError(
            f"{folder}: tensor {name} is missing (tensors are named like {shown(some)}); take a causal LM's folder"
        )
    if foreign := closest_foreign(name, shape, tensors):
        return UserError(
            f"{folder}: tensor {name} is missing, and {shown(foreign)} is no tensor of {shape.architecture}; "
            f"take a checkpoint that transformers saved for {shape.architecture}, or download it again"
        )
    return UserError(f"{folder}: tensor {name} is missing; {again}")


def bare(name: str) -> str:
    """A tensor's name without the base model's prefix."""
    return name.removeprefix("model.")


def is_embedding(name: str) -> bool:
    """Whether a name is the token embedding's."""
    return bare(name).startswith("embed_tokens")


def closest_foreign(name: str, shape: Shape, tensors: Collection[str]) -> str | None:
    """The stored tensor outside the model whose name shares the longest prefix with `name`; None if there is none."""
    known = {bare(own) for own, _ in architecture(shape.architecture).each_stored(shape)}
    foreign = sorted(stored for stored in tensors if bare(stored) not in known)

    def likeness(stored: str) -> int:
        pairs = zip(bare(stored).split("."), bare(name).split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(foreign, key=likeness, default=None)


def wrong_size(
    folder: Path,
    name: str,
    size: tuple[int, ...],
    entry: Entry,
    shape: Shape,
    tensors: Mapping[str, list[Entry]],
    config: Mapping[str, Any],
) -> UserError:
    """The error for a tensor whose size contradicts config.json."""
    if quantised := quantisation(tensors, config):
        return UserError(f"{folder}: {quantised}; {REMEDY}")
    if entry.dtype not in STORED_DTYPES:
        return wrong_type(folder, entry, config)
    if 0 in entry.size:
        return UserError(
            f"{folder}: tensor {entry.name} is empty, as when a model sharded by DeepSpeed ZeRO-3 or FSDP is saved without "
            "gathering its weights; save it again with the gathered state dict"
        )
    rows = matrix_rows(tensors)
    if len(entry.size) == 2 and entry.size[1:] == size[1:] and size[0] == shape.vocab_size and len(rows) > 1:
        counts = " and ".join(f"{shown(stored)} {number}" for stored, number in rows.items())
        return UserError(
            f"{folder}: the rows of embedding and output layer differ ({counts}; config.json says "
            f"vocab_size={shape.vocab_size}); call resize_token_embeddings on the model and save it again"
        )
    if len(entry.size) == 2 and entry.size[1:] == size[1:] and size[0] == shape.vocab_size:
        return UserError(
            f"{folder}: tensor {entry.name} has {entry.size[0]} rows, config.json says vocab_size={shape.vocab_size}; "
            f"set vocab_size={entry.size[0]} if the embedding was resized, otherwise download the checkpoint again"
        )
    if prod(entry.size) == prod(size):
        return UserError(
            f"{folder}: tensor {name} has size {list(entry.size)}, config.json says {list(size)}: the same number of values in "
            "another layout, which transformers rejects too; convert the checkpoint again"
        )
    return UserError(
        f"{folder}: tensor {name} has size {list(entry.size)}, config.json says {list(size)}; "
        "the folder mixes two models: copy config.json and weights from one of them"
    )


def matrix_rows(tensors: Mapping[str, list[Entry]]) -> dict[str, int]:
    """Number of rows of embedding and output layer by stored name; empty if they are equal."""
    matrices = {
        name: entries[0].size[0]
        for name, entries in tensors.items()
        if bare(name) in ("embed_tokens.weight", "lm_head.weight") and entries[0].size
    }
    return matrices if len(set(matrices.values())) > 1 else {}


def wrong_type(folder: Path, entry: Entry, config: Mapping[str, Any]) -> UserError:
    """The error for a tensor whose type cannot be trained: eight bits or fewer, or integers."""
    by = f" (quantised with {method(config)})" if method(config) else ""
    supported = ", ".join(STORED_DTYPES)
    return UserError(f"{folder}: tensor {entry.name} has type {entry.dtype}{by}; supported: {supported}; {REMEDY}")
