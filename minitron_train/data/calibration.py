"""The tokens that importance is measured on (arXiv 2407.14679 §2.2: 1024 samples drawn from the training data)."""

# batches, sequences, length: the shape that the scores are aggregated over
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitron_train.config import CalibrationConfig, DataConfig
from minitron_train.data.stream import TokenStream
from minitron_train.runtime.errors import UserError

SEED_OFFSET = zlib.crc32(b"calibration")  # a shuffle of its own: not the sequences that training begins with


def calibration_batches(
    calibration: CalibrationConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> Tensor:
    """Calibration tokens, int64 [batches, sequences, length].

    From the file `calibration.tokens_path` as its batches are; else `num_samples` sequences of `calibration.path` or of the
    training stream (never of its held-out part), in micro-batches; a last, smaller micro-batch is refused.
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
    tokens = stream.next_batch(calibration.num_samples).tokens_BS
    return tokens.view(-1, size, calibration.seq_length)


def batch_size(calibration: CalibrationConfig) -> int:
    """Sequences of a micro-batch; refuses a number of samples that is no multiple of it."""
    size = min(calibration.micro_batch_size, calibration.num_samples)
    if calibration.num_samples % size:
        raise UserError(
            f"calibration.num_samples={calibration.num_samples}: must be a multiple of calibration.micro_batch_size={size}; "
            "change one of them"
        )
    return size


def calibration_data(calibration: CalibrationConfig, data: DataConfig) -> DataConfig:
    """The stream that calibration reads where it has no tokens of its own: one phase; all of `calibration.path`."""
    blend = replace(data, num_workers=0, late_fraction=0.0, document_attention=False)
    return replace(blend, path=calibration.path, validation_fraction=0.0) if calibration.path else blend


def read_tokens(path: Path) -> Tensor:
    """`tokens` [batches, sequences, length] int64 of a safetensors file."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
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
        raise UserError(f"calibration.tokens_path={path}: holds {', '.join(names)}, not `tokens`; name the tensor so")
    if tokens.dim() != 3 or tokens.dtype != torch.int64 or not tokens.numel():
        shape = "x".join(map(str, tokens.shape))
        raise UserError(
            f"calibration.tokens_path={path}: {tokens.dtype} {shape}; must be int64 [batches, sequences, length]"
        )
    return tokens
