"""The scoring stage: runs calibration tokens through the teacher and writes activation statistics to scores.safetensors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_train import hf
from minitron_train.arch import architecture
from minitron_train.arch.shape import Shape
from minitron_train.config import CalibrationConfig, Config
from minitron_train.model.build import DTYPES
from minitron_train.parallel.groups import Groups
from minitron_train.planning.hardware import memory_here
from minitron_train.planning.precision import agreed
from minitron_train.pruning import importance as scores
from minitron_train.pruning.collect import Statistics, check_finite, collect, merge_ranks
from minitron_train.pruning.criterion import Evidence, depth_criterion
from minitron_train.pruning.layer_removal import without_each_layer
from minitron_train.pruning.layers import Layers
from minitron_train.pruning.shards import RowReader
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import read_world


def score_checkpoint(
    config: Config, groups: Groups, *, teacher: hf.HFFolder, tokens: Tensor, folder: Path
) -> dict[str, Any]:
    """Score `teacher` on `tokens`; the first rank writes `folder`/scores.safetensors.

    Args:
        tokens: int64 [batches, sequences, length]; a negative token is padding at the end of a sequence.

    Returns:
        Facts for the stage's provenance.

    Raises:
        UserError: tokens outside the vocabulary, too few sequences, NaN or infinities in the activations.
    """
    calibration = config.calibration
    teacher.shape.check_parallel(groups.tp_size, "teacher")
    sequences_NS = tokens.flatten(0, 1)
    check_tokens(sequences_NS, teacher, groups.dp_size)
    dtype = scoring_dtype(calibration, groups)
    streamed = calibration.streamed if calibration.streamed is not None else not fits(teacher.shape, groups, dtype)
    layers = Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=not streamed, dtype=dtype)
    criterion = depth_criterion(config.prune.depth)
    statistics = gather_evidence(layers, tokens, calibration, without_layers=criterion.needs_layer_removal)
    facts = {
        "samples": len(sequences_NS),
        "tokens": statistics.num_tokens,
        "teacher": hf.fingerprint(teacher.folder),
        "streamed": streamed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if groups.is_first:
        evidence = Evidence(
            statistics=statistics,
            source=teacher,
            table=teacher.table,
            shape=teacher.shape,
            prune=config.prune,
            seed=config.seed,
        )
        scores.write(folder / scores.FILE, evidence, {"teacher": facts["teacher"]})
    groups.barrier()
    return facts


def gather_evidence(
    layers: Layers, tokens: Tensor, calibration: CalibrationConfig, *, without_layers: bool = False
) -> Statistics:
    """Statistics of all ranks over `tokens` [batches, sequences, length], on the CPU; the same on every rank.

    Args:
        without_layers: also run the model without each layer, which takes L/2 more forward passes for L layers.

    Raises:
        UserError: NaN or infinities in the activations.
    """
    groups = layers.groups
    mine_NS = tokens.flatten(0, 1)[groups.dp_rank :: groups.dp_size]
    sizes = {"micro_batch_size": calibration.micro_batch_size, "chunk_tokens": calibration.chunk_tokens}
    statistics = merge_ranks(collect(layers, mine_NS, **sizes), groups)
    check_finite(statistics)
    if without_layers:
        statistics.losses_without, statistics.logit_changes = without_each_layer(layers, mine_NS, **sizes)
    return statistics.cpu()


def scoring_dtype(calibration: CalibrationConfig, groups: Groups) -> torch.dtype:
    """Number type of weights and activations; statistics are always fp32 and fp64. Collective."""
    return DTYPES[agreed(calibration.precision, groups)]


def fits(shape: Shape, groups: Groups, dtype: torch.dtype) -> bool:
    """Whether all layers take at most half of the free memory on every rank's device."""
    counts = architecture(shape.architecture).parameters(shape)
    needed = dtype.itemsize * sum(counts[part] for part in ("attention", "mlp", "norms")) / groups.tp_size
    if groups.device.type == "cuda":
        free = torch.cuda.mem_get_info(groups.device)[0]
    else:
        free = memory_here(cuda=False) / read_world().local_size
    return not groups.any(needed > free / 2)


def check_tokens(sequences_NS: Tensor, teacher: hf.HFFolder, num_parts: int) -> None:
    """Reject tokens outside the vocabulary, misplaced padding, sequences that are too long, and too few sequences."""
    if len(sequences_NS) < num_parts:
        raise UserError(
            f"calibration: {len(sequences_NS)} sequences for {num_parts} data-parallel ranks; give more samples"
        )
    is_token = sequences_NS >= 0
    if not is_token[:, 0].all() or (is_token[:, 1:] & ~is_token[:, :-1]).any():
        raise UserError(
            "calibration.tokens_path: padding (-1) stands before a token; a sequence begins with a token and is padded at its end"
        )
    largest, vocab = int(sequences_NS.max()), teacher.shape.vocab_size
    if largest >= vocab:
        raise UserError(
            f"calibration: token {largest} is outside the vocabulary of {vocab} entries; "
            "use tokens made with this teacher's tokenizer"
        )
    teacher.shape.check_length(sequences_NS.shape[1], "calibration.seq_length", "teacher")
