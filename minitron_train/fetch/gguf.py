"""Convert a quantised GGUF file to an unquantised Hugging Face folder in fp32."""

import contextlib
import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_train.runtime.errors import UserError, first_line

# GGUF stores only the *name* of the pre-tokenizer (tokenizer.ggml.pre), and transformers builds a plain byte-level one
# for every name. SmolLM2 was trained with one token per digit. The plain one turns the double space in "x =  10" into
# two single spaces, where the model was trained on one double space.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}


def bars_on_terminal_only() -> contextlib.AbstractContextManager[Any]:
    """Suppress transformers' progress bars unless stderr is a terminal: they would fill log files."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


class BoundedReader(GGUFReader):
    """gguf's reader with a bounds check: a count or offset beyond the end of the file is an error.

    gguf 0.19 slices its memory map, and a slice beyond the end is empty instead of an error. It would loop over every
    entry of an array that claims 2^60 of them.
    """

    def _get(
        self,
        offset: int,
        dtype: Any,
        count: int = 1,
        override_order: Any = None,
    ) -> Any:
        """Read one value or array.

        Raises:
            ValueError: the bytes are not in the file.
        """
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if not 0 <= int(offset) <= end <= len(self.data):
            raise ValueError(f"it points to byte {end:,} of {len(self.data):,}")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> GGUFReader:
    """The header and the tensors of a GGUF file.

    Raises:
        UserError: it is damaged: impossible counts, lengths, offsets or types, names that are not UTF-8, or cut off.
    """
    try:
        with np.errstate(over="ignore"):
            reader = BoundedReader(path)
    except (ValueError, OSError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path.name}: not a readable GGUF file ({first_line(error)}); use another wheel") from error
    architecture = header_value(reader, path, "general.architecture")
    if architecture != "llama":
        raise UserError(f"{path.name}: general.architecture={architecture!r}, only llama is read; use another wheel")
    check_sizes(reader, path)
    return reader


def header_value(reader: GGUFReader, path: Path, key: str) -> Any:
    """A value of the header; None if the key is missing.

    Raises:
        UserError: text that is not UTF-8.
    """
    field = reader.get_field(key)
    try:
        return field.contents() if field else None
    except ValueError as error:
        raise UserError(f"{path.name}: {key} cannot be read ({first_line(error)}); use another wheel") from error


def check_sizes(reader: GGUFReader, path: Path) -> None:
    """Refuse a header whose sizes differ from its tensors', before a model of these sizes is allocated.

    Raises:
        UserError: names the first key that does not fit, and the size of the tensors.
    """
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}  # innermost first
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    found = {
        "llama.block_count": [len(layers)],
        "llama.embedding_length": shapes.get("token_embd.weight", [0])[:1],
        "llama.feed_forward_length": shapes.get("blk.0.ffn_gate.weight", [0])[1:],
    }
    for key, sizes in found.items():
        value = header_value(reader, path, key)
        if [value] != sizes:
            says = f"{key}={value}, its tensors say {sizes[0] if sizes else 'nothing'}"
            raise UserError(f"{path.name}: {says}; it is damaged, use another wheel")


def read_header(path: Path) -> dict[str, Any]:
    """Facts of the header: model name, licence, tokenizer.ggml.pre, number of tensors of each quantisation.

    Raises:
        UserError: not a readable GGUF file, or a pre-tokenizer that PRE_TOKENIZERS does not know.
    """
    reader = open_gguf(path)
    names = {"model_name": "general.name", "license": "general.license", "pre_tokenizer": "tokenizer.ggml.pre"}
    facts: dict[str, Any] = {ours: header_value(reader, path, theirs) for ours, theirs in names.items()}
    if wrong := [names[ours] for ours, value in facts.items() if not isinstance(value, str | None)]:
        raise UserError(f"{path.name}: {wrong[0]} is not text; it is damaged, use another wheel")
    facts["tensor_types"] = dict(Counter(tensor.tensor_type.name for tensor in reader.tensors))
    if facts["pre_tokenizer"] not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        rule = f"tokenizer.ggml.pre={facts['pre_tokenizer']} is not one that can be restored ({known})"
        raise UserError(f"{path.name}: {rule}; use a Hugging Face folder of the model with teacher.path")
    return facts


def convert_gguf(path: Path, folder: Path) -> dict[str, Any]:
    """Write config.json, model.safetensors (fp32), generation_config.json and the tokenizer into `folder`.

    Args:
        path: the .gguf file.
        folder: exists; receives the files.

    Returns:
        The facts of read_header.

    Raises:
        UserError: see read_header.
    """
    facts = read_header(path)
    with bars_on_terminal_only():
        source: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, **source, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        except Exception as error:  # a wrong header makes transformers raise many kinds
            raise UserError(
                f"{path.name}: transformers cannot convert it ({first_line(error)}); use another wheel"
            ) from error
        forget_gguf(model)
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[facts["pre_tokenizer"]]()
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return facts


def forget_gguf(model: Any) -> None:
    """Remove the attributes that make transformers save, and later load, the dequantised model as a quantised one."""
    config = model.config
    del config.quantization_config
    model.hf_quantizer = None
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # stored in fp32: 9.999999747378752e-06 is 1e-5
