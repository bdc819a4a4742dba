"""Seconds of one model's prefill and decode through transformers, as a user of the exported folder would run it.

Greedy decoding with transformers' key/value cache; one forward pass for each new token. The clock stops after the device has
finished, so a GPU's asynchronous kernels count.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron_train.arch import Shape
from minitron_train.hf import auto_class, read_json
from minitron_train.runtime.errors import UserError, first_line

# B sequences, P tokens of a prompt


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of one prompt and of the tokens after it, and the bytes of all keys and values at the end."""

    prefill_s: float
    decode_s: float
    cache_bytes: int


def open_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Open a Hugging Face folder with transformers. Only safetensors are read, and no code of the folder is run.

    Raises:
        UserError: transformers does not open it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto = getattr(transformers, auto_class(read_json(folder / "config.json")))
    try:
        model = auto.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder}: transformers does not open it ({first_line(error)}); set speed.in_run=false to run without its speed"
        ) from error
    return model.to(device).eval()


def random_model(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make a model with random weights from the contents of a config.json."""
    import transformers

    auto, made = getattr(transformers, auto_class(config)), transformers.AutoConfig.for_model(**config)
    with device:
        return auto.from_config(made, dtype=dtype).eval()


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers in memory; tied weights count once."""
    storages = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def time_generation(model: nn.Module, prompt_BP: Tensor, new_tokens: int) -> Pass:
    """Time one forward pass over a prompt, and one for each of `new_tokens` greedy tokens after it."""
    with torch.inference_mode():
        cache = empty_cache(model)
        with stopwatch(prompt_BP.device) as prefill:
            token_B1 = next_token(model, prompt_BP, cache)
        decode_s = time_decoding(model, token_B1, cache, new_tokens)
    return Pass(prefill.seconds, decode_s, cache_bytes(cache))


def time_decoding(model: nn.Module, token_B1: Tensor, cache: Any, new_tokens: int) -> float:
    """Return the seconds of `new_tokens` forward passes of one token per sequence, which extend the cache."""
    with torch.inference_mode(), stopwatch(token_B1.device) as watch:
        for _ in range(new_tokens):
            token_B1 = next_token(model, token_B1, cache)
    return watch.seconds


def next_token(model: nn.Module, tokens_BS: Tensor, cache: Any) -> Tensor:
    """Return the most probable next token of each sequence, [B, 1]. The cache gets the keys and values of the tokens."""
    found = model(input_ids=tokens_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return found.logits[:, -1:].argmax(-1)


def empty_cache(model: nn.Module) -> Any:
    """Make transformers' cache for a model; layers with a window keep the window's tokens only."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)  # type: ignore[arg-type]


def filled_cache(model: nn.Module, shape: Shape, batch_size: int, context: int) -> Any:
    """Make a cache that holds keys and values of `context` tokens, all ones, so that decoding needs no prefill before it."""
    first = next(model.parameters())
    cache = empty_cache(model)
    sizes = (batch_size, shape.num_query_groups, context, shape.kv_channels)
    for layer in range(shape.num_layers):
        keys, values = (torch.ones(sizes, dtype=first.dtype, device=first.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all keys and values in a cache."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in tensors)


class Stopwatch:
    """Seconds between start and end; 0 before the end."""

    seconds = 0.0


@contextlib.contextmanager
def stopwatch(device: torch.device) -> Iterator[Stopwatch]:
    """Measure the time of the work inside, including what a GPU still computes at its end."""
    watch = Stopwatch()
    synchronise(device)
    start_s = time.perf_counter()
    yield watch
    synchronise(device)
    watch.seconds = time.perf_counter() - start_s


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
