"""The tokens that importance is measured on (arXiv 2407.14679 §2.2: 1024 samples drawn from the training data)."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitron_train.config import CalibrationConfig, DataConfig
from minitron_train.data.pack import PAD
from minitron_train.data.stream import TokenStream
from minitron_train.data.tokenizers import digest
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_file
from minitron_train.runtime.records import Integer, decode

METADATA = "minitron_train"  # key in the metadata of a token file, whose value is `Made` as JSON
SEED_OFFSET = zlib.crc32(b"calibration")  # a separate shuffle: not the first sequences of the training


class Made(TypedDict):
    """How calibration tokens were made, in the metadata of their file."""

    tokenizer: str  # data.tokenizers.digest
    inputs: dict[str, str]  # fingerprints of the text's sources, and what decides the stream
    settings: dict[str, Any]  # of section calibration
    seed: Integer


def calibration_batches(
    calibration: CalibrationConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> Tensor:
    """Calibration tokens, int64 [batches, sequences, length].

    Scores are aggregated over these three axes. The file `calibration.tokens_path` gives its own batches. Otherwise they are
    `num_samples` sequences of `calibration.path` or of the training stream (never of its held-out part), in micro-batches.
    A negative token is padding, at the end of a sequence of conversations.

    Raises:
        UserError: no tokenizer, a smaller last micro-batch, or a file without such tokens.
    """
    if calibration.tokens_path:
        return read_tokens(Path(calibration.tokens_path))
    if tokenizer is None:
        raise UserError(
            "teacher.path has no tokenizer: calibration needs one; add it, or give calibration.tokens_path=FILE"
        )
    size = batch_size(calibration)
    blend = calibration_data(calibration, data)
    stream = TokenStream(blend, tokenizer, seq_length=calibration.seq_length, seed=(seed + SEED_OFFSET) % 2**32)
    batch = stream.next_batch(calibration.num_samples)
    tokens = batch.tokens_BS
    if batch.documents_BS is not None:
        tokens = tokens.masked_fill(batch.documents_BS == PAD, -1)
    return tokens.view(-1, size, calibration.seq_length)


def batch_size(calibration: CalibrationConfig) -> int:
    """Sequences per micro-batch; a UserError unless the number of samples is a multiple of it."""
    size = min(calibration.micro_batch_size, calibration.num_samples)
    if calibration.num_samples % size:
        raise UserError(
            f"calibration.num_samples={calibration.num_samples}: must be a multiple of calibration.micro_batch_size={size}; "
            "change one of them"
        )
    return size


def calibration_data(calibration: CalibrationConfig, data: DataConfig) -> DataConfig:
    """The stream that calibration reads without a token file: a single phase, and all of `calibration.path`."""
    blend = replace(data, num_workers=0, late_fraction=0.0, document_attention=False)
    return replace(blend, path=calibration.path, validation_fraction=0.0) if calibration.path else blend


def write_tokens(path: Path, tokens: Tensor, made: Made) -> None:
    """Write calibration tokens atomically as a file for calibration.tokens_path; its metadata hold `made` as JSON."""
    with atomic_file(path) as scratch:
        save_file({"tokens": tokens.contiguous()}, scratch, metadata={METADATA: json.dumps(made, sort_keys=True)})


def check_made_with(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a token file that says it was made with another tokenizer. Files of other programs say nothing, and pass.

    Raises:
        UserError: it was, or its metadata are damaged.
    """
    where = f"calibration.tokens_path={path}"
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return
    made = decode(text, Made, where, "write the file again with calibration.save_path")
    if made["tokenizer"] != digest(tokenizer):
        raise UserError(
            f"{where}: its tokens are of another tokenizer than the teacher's, so they mean other text; "
            "write the file again with this teacher and calibration.save_path"
        )


def read_tokens(path: Path) -> Tensor:
    """Read the tensor `tokens`, int64 [batches, sequences, length], of a safetensors file."""
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise UserError(f"calibration.tokens_path={path}: is not a file; give a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tokens = file.get_tensor("tokens") if "tokens" in names else None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"calibration.tokens_path={path}: not a readable safetensors file ({error}); write it again"
        ) from error
    if tokens is None:
        raise UserError(f"calibration.tokens_path={path}: holds {', '.join(names)}, not `tokens`; rename the tensor")
    if tokens.dim() != 3 or tokens.dtype != torch.int64 or not tokens.numel():
        shape = "x".join(map(str, tokens.shape))
        raise UserError(
            f"calibration.tokens_path={path}: {tokens.dtype} {shape}; must be int64 [batches, sequences, length]"
        )
    return tokens
