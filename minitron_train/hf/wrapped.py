"""config.json of a vision-language model: the text model's part of it, and a student's."""

from collections.abc import Mapping, Sequence
from typing import Any

from minitron_train.arch.shape import SIZES, Shape
from minitron_train.arch.table import HARMLESS_KEYS, Architecture
from minitron_train.arch.wrappers import WRAPPERS, Wrapper
from minitron_train.hf.values import as_authors_give_it, spoken
from minitron_train.runtime.errors import UserError

TEXT, VISION, TIED = "text_config", "vision_config", "tie_word_embeddings"
FOLDER_KEYS = frozenset(  # keys about the teacher's files or one process, untrue of a student
    {"quantization_config", "compression_config", "sparsity_config", "auto_map", "_name_or_path", "name_or_path"}
    | {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"}
)
MULTIMODAL_ROPE = "mrope"  # three positions for each token; a text's are equal, and the embedding is the plain one


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """The vision-language model that config.json describes; None if it describes a text model."""
    name = config.get("model_type")
    return WRAPPERS.get(name) if isinstance(name, str) else None


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that opens a folder with this config.json."""
    return "AutoModelForCausalLM" if wrapper_of(config) is None else "AutoModelForImageTextToText"


def inner(config: Mapping[str, Any], wrapper: Wrapper, where: str) -> Mapping[str, Any]:
    """The object that holds the text model's keys: text_config, or config.json itself in older folders."""
    text = config.get(TEXT)
    if text is None and wrapper.flat:
        return {key: value for key, value in config.items() if key not in (VISION, "model_type")}
    if not isinstance(text, Mapping):
        raise UserError(f"{where}: {TEXT}={spoken(text)} is not an object; {as_authors_give_it('it')}")
    return text


def text_config(config: Mapping[str, Any], wrapper: Wrapper, where: str) -> dict[str, Any]:
    """The text model's config.json, as if it stood alone.

    Raises:
        UserError: it is missing, or its family is not supported inside this model.
    """
    text = inner(config, wrapper, where)
    family = text.get("model_type", next(iter(wrapper.texts)))
    if not isinstance(family, str) or family not in wrapper.texts:
        raise UserError(
            f"{where}: {TEXT} has model_type {spoken(family)}; inside {wrapper.name} only "
            f"{', '.join(wrapper.texts)} is supported; use another teacher"
        )
    tied = config.get(TIED, wrapper.tied)
    if wrapper.text_ties and tied is False:
        tied = text.get(TIED, False)
    alone = {**wrapper.text_defaults, **text, "model_type": wrapper.texts[family], TIED: tied}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := alone.get(key), Mapping):
            alone[key] = {kind: "default" if value == MULTIMODAL_ROPE else value for kind, value in rope.items()}
    return alone


def bound_layers(config: Mapping[str, Any]) -> int:
    """How many first layers image features are added to the output of (Qwen3-VL's deepstack)."""
    vision = config.get(VISION)
    indices = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
    return len(indices) if isinstance(indices, list) else 0


def wrapped_student(
    config: Mapping[str, Any],
    wrapper: Wrapper,
    table: Architecture,
    shape: Shape,
    kept: Sequence[int],
    dtype: str | None,
) -> dict[str, Any]:
    """The teacher's config.json with the text model's sizes of `shape`, and the width of image features.

    All other keys stay as they are.

    Args:
        kept: the teacher's layers that the student keeps.
    """
    text = inner(config, wrapper, "config.json")
    num_layers = text.get("num_hidden_layers", wrapper.text_defaults.get("num_hidden_layers"))
    sizes = {
        table.config_keys[name]: getattr(shape, name) for name in (*SIZES, "kv_channels") if name in table.config_keys
    }
    lists = {
        key: [value[i] for i in kept]
        for key, value in text.items()
        if isinstance(value, list) and len(value) == num_layers and len(kept) != num_layers and key not in HARMLESS_KEYS
    }
    changed = lists | sizes | (written_dtype(text, dtype))
    outer = {"architectures": [wrapper.hf_class], **written_dtype(config, dtype)}
    if wrapper.writers_key is not None and text.get("hidden_size") != shape.hidden_size:
        outer[VISION] = {**(config.get(VISION) or {}), wrapper.writers_key: shape.hidden_size}
    if config.get(TEXT) is None:
        return {**true_of_student(config), **changed, **outer}
    return {**true_of_student(config), TEXT: {**true_of_student(text), **changed}, **outer}


def true_of_student(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not about the teacher's files."""
    return {key: value for key, value in config.items() if key not in FOLDER_KEYS}


def written_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The number type, under the keys that name one already."""
    return {key: dtype for key in ("dtype", "torch_dtype") if key in config and dtype is not None}
