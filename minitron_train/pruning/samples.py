"""Calibration text that the teacher writes itself: what it was trained on, as far as it can tell (arXiv 2410.17170)."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitron_train import hf
from minitron_train.arch.convert import load
from minitron_train.arch.shape import Shape
from minitron_train.config import CalibrationConfig, Config
from minitron_train.data.calibration import batch_size, calibration_batches
from minitron_train.data.tokenizers import document_start
from minitron_train.model.build import build
from minitron_train.model.forward import inference
from minitron_train.model.generate import sample
from minitron_train.parallel.groups import Groups
from minitron_train.pruning.scoring import fits, scoring_dtype
from minitron_train.pruning.shards import RowReader
from minitron_train.runtime.console import progress
from minitron_train.runtime.errors import UserError

FILE = "tokens.safetensors"  # beside the scores: what cut and repair read again
CACHE_VALUES = 2**30  # keys and values that a batch of texts may come to
MOST_AT_ONCE = 64  # texts
SEED_OFFSET = zlib.crc32(b"samples")


def tokens_with_samples(
    config: Config, groups: Groups, teacher: hf.HFFolder, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Tensor:
    """Calibration tokens of which the teacher writes a share, int64 [batches, sequences, length].

    Both kinds come in one random order, since a repair may use the first ones alone. The first rank keeps them in folder/FILE.

    Raises:
        UserError: what `write` and `calibration_batches` refuse.
    """
    calibration, seed = config.calibration, config.seed
    size = batch_size(calibration)
    num_written = max(1, round(calibration.self_generated_fraction * calibration.num_samples))
    sequences = []
    if num_read := calibration.num_samples - num_written:
        text = replace(calibration, num_samples=num_read, micro_batch_size=1)
        sequences.append(calibration_batches(text, config.data, tokenizer, seed).flatten(0, 1))
    prompt = document_start(tokenizer, config.data.document_end)
    sequences.append(generate_samples(calibration, groups, teacher, prompt, num_written, seed))
    if groups.device.type == "cuda":
        torch.cuda.empty_cache()  # scoring looks at what is free before it decides to hold all layers
    tokens_NS = torch.cat(sequences)
    order = torch.randperm(len(tokens_NS), generator=torch.Generator().manual_seed(seed))
    tokens = tokens_NS[order].view(-1, size, calibration.seq_length)
    if groups.is_first:
        save_file({"tokens": tokens}, folder / FILE)
    return tokens


def generate_samples(
    calibration: CalibrationConfig, groups: Groups, teacher: hf.HFFolder, prompt: list[int], num: int, seed: int
) -> Tensor:
    """`num` texts by the teacher at temperature 1, int64 [num, length], the same on every rank.

    Args:
        prompt: what stands before a text: the end of another document, and what begins one.

    Raises:
        UserError: the teacher does not fit whole, or its logits are not finite.
    """
    shape, dtype = teacher.shape, scoring_dtype(calibration, groups.device)
    shape.check_length(calibration.seq_length + len(prompt), "calibration.seq_length", "teacher")
    if calibration.streamed or not fits(shape, groups, dtype):
        raise UserError(
            f"calibration.self_generated_fraction={calibration.self_generated_fraction}: a teacher that is streamed layer by "
            "layer cannot generate text; set it to 0, or use more tensor-parallel ranks"
        )
    model = build(shape, tp=groups.tp_size, dtype=dtype)
    load(model, teacher.table, shape, RowReader(teacher), groups.tp_rank, groups.tp_size)
    length = calibration.seq_length
    size = at_once(shape, length)
    texts_NS = torch.zeros(num, length, dtype=torch.int64, device=groups.device)
    mine = range(groups.dp_rank * size, num, groups.dp_size * size)

    def steps() -> Iterator[int]:
        for start in mine:
            rows = texts_NS[start : start + size]
            generator = torch.Generator(groups.device).manual_seed((seed + SEED_OFFSET + start) % 2**32)
            for place, tokens_B in enumerate(sample(model, prompt, len(rows), length, generator, groups)):
                rows[:, place] = tokens_B
                yield place

    try:
        with inference(model):
            for _ in progress(steps(), "teacher writes", len(mine) * length):
                pass
    except FloatingPointError as error:
        raise UserError(
            f"{teacher.folder}: {error}; the weights are damaged or overflow: check them, or set calibration.precision=fp32"
        ) from error
    return groups.sum_over_data(texts_NS).cpu()  # a row is zero on all ranks but one


def at_once(shape: Shape, length: int) -> int:
    """Texts of a batch, the same whatever the ranks: so many that keys and values stay within a bound."""
    values = 2 * shape.num_layers * shape.axis_size("kv") * length
    return max(1, min(MOST_AT_ONCE, CACHE_VALUES // values))
