"""Calibration tokens, from the stream and from a file."""

import pytest
import torch
from safetensors.torch import save_file

from minitron_train.config import CalibrationConfig
from minitron_train.data.calibration import calibration_batches
from minitron_train.data.stream import TokenStream, validation_tokens
from minitron_train.runtime.errors import UserError


def windows(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    """All runs of 12 tokens."""
    return {tuple(run) for row in tokens for run in row.unfold(0, 12, 1).tolist()}


def test_from_the_stream(numbered_words):
    """The asked-for shape, repeatable, another shuffle than training's, no held-out text."""
    data, tokenizer = numbered_words
    calibration = CalibrationConfig(num_samples=24, seq_length=64, micro_batch_size=8)
    tokens = calibration_batches(calibration, data, tokenizer, seed=1)
    assert tokens.shape == (3, 8, 64) and tokens.dtype == torch.int64
    assert torch.equal(tokens, calibration_batches(calibration, data, tokenizer, seed=1))
    assert not torch.equal(tokens, calibration_batches(calibration, data, tokenizer, seed=2))
    stream = TokenStream(data, tokenizer, seq_length=64, seed=1)
    first = stream.next_batch(24).tokens_BS
    assert not torch.equal(first, tokens.flatten(0, 1))
    held = validation_tokens(data, tokenizer, 64, seed=1)
    assert windows(held).isdisjoint(windows(tokens.flatten(0, 1)))


def test_from_files(numbered_words, tmp_path):
    data, tokenizer = numbered_words
    own = tmp_path / "own.txt"
    own.write_text("calibrate on this\n" * 200)
    calibration = CalibrationConfig(path=str(own), num_samples=4, seq_length=32, micro_batch_size=8)
    tokens = calibration_batches(calibration, data, tokenizer, seed=1)
    assert tokens.shape == (1, 4, 32) and "calibrate on this" in tokenizer.decode(tokens[0, 0])
    expected = torch.arange(24).view(2, 3, 4)
    save_file({"tokens": expected}, tmp_path / "tokens.safetensors")
    calibration = CalibrationConfig(tokens_path=str(tmp_path / "tokens.safetensors"))
    assert torch.equal(calibration_batches(calibration, data, None, seed=1), expected)


def test_mistakes(numbered_words, tmp_path):
    data, tokenizer = numbered_words
    with pytest.raises(UserError, match=r"multiple of calibration\.micro_batch_size"):
        calibration_batches(CalibrationConfig(num_samples=9, micro_batch_size=8), data, tokenizer, seed=1)
    with pytest.raises(UserError, match=r"calibration\.tokens_path=FILE"):
        calibration_batches(CalibrationConfig(), data, None, seed=1)
    path = tmp_path / "tokens.safetensors"
    for content, message in (
        ({"ids": torch.zeros(1, 1, 1, dtype=torch.int64)}, "holds ids"),
        ({"tokens": torch.zeros(1, 1, dtype=torch.int64)}, "batches, sequences, length"),
        ({"tokens": torch.zeros(1, 1, 1)}, "must be int64"),
    ):
        save_file(content, path)
        with pytest.raises(UserError, match=message):
            calibration_batches(CalibrationConfig(tokens_path=str(path)), data, tokenizer, seed=1)
    path.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="not a readable"):
        calibration_batches(CalibrationConfig(tokens_path=str(path)), data, tokenizer, seed=1)
    with pytest.raises(UserError, match="not a readable"):
        calibration_batches(CalibrationConfig(tokens_path=str(tmp_path / "none")), data, tokenizer, seed=1)
