"""held_out.safetensors of a training: the sequences of validation, so that a resumed run does not search the corpus again.

With a held-out fraction of 0.2 %, a million held-out tokens are found in 500 million tokens of text.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitron_train.config import DataConfig
from minitron_train.data.feed import Feed
from minitron_train.data.stream import take_held_out, validation_feed
from minitron_train.data.tokenizers import sequence_start
from minitron_train.runtime.console import say
from minitron_train.runtime.files import atomic_file
from minitron_train.runtime.records import open_file

HELD_OUT = "held_out.safetensors"
ORDER = 1  # raise it when the same sources give other tokens


def kept_tokens(
    folder: Path, data: DataConfig, tokenizer: PreTrainedTokenizerBase, seq_length: int, seed: int
) -> Tensor:
    """The tokens of `validation_tokens`, read from a training's folder, or found and written there."""
    feed = validation_feed(data, tokenizer, seq_length)
    start = sequence_start(tokenizer, data)
    path, key = folder / HELD_OUT, key_of(feed, data, seq_length, seed, start)
    tokens = read(path, key)
    if tokens is None:
        tokens = take_held_out(feed, data, seq_length, seed, start)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as scratch:
            save_file({"tokens": tokens}, scratch, metadata={"key": key, "sha256": sha256(tokens)})
    return tokens


def key_of(feed: Feed, data: DataConfig, seq_length: int, seed: int, start: int | None) -> str:
    """sha256 of all that decides the tokens."""
    split = feed.pool.maker.split
    text = f"{ORDER} {feed.known.fingerprint} {split} {feed.unit_bytes} {data.validation_tokens} {seq_length} {seed}"
    text += f" {data.late_fraction}" if data.late_fraction else ""
    text += "" if start is None else f" begins with {start}"
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path, key: str) -> Tensor | None:
    """The tokens of a file; None if there is none or it was made from something else. A damaged file is reported.

    Raises:
        UserError: it is a folder or a pipe, or cannot be opened.
    """
    try:
        with open_file(path), safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("key") != key:
                return None
            tokens = file.get_tensor("tokens")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        say(f"warning: {path}: cannot be read ({error}); the held-out tokens are searched again")
        return None
    if found.get("sha256") != sha256(tokens):
        say(f"warning: {path}: is damaged; the held-out tokens are searched again")
        return None
    return tokens


def sha256(tokens: Tensor) -> str:
    """sha256 of shape, dtype and values."""
    digest = hashlib.sha256(f"{tuple(tokens.shape)} {tokens.dtype}".encode())
    digest.update(tokens.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
