"""Scoring, slicing and disk."""

from math import prod
from typing import Any

from minitron_train.arch import Shape, architecture
from minitron_train.config import Config, ExportDtype, Precision
from minitron_train.data.sources import copied_bytes
from minitron_train.planning.counts import forward_flops_per_token, parameters
from minitron_train.planning.hardware import Hardware
from minitron_train.planning.memory import FP32, Layout, repair_bytes, score_bytes, slice_bytes
from minitron_train.planning.timing import score_seconds, slice_seconds

BF16 = 2
TOKENS_PER_INPUT = (
    4  # of a repair's least squares; fewer fit noise: on SmolLM2 the result is then worse than the plain cut
)


def scoring(config: Config, teacher: Shape, machine: Hardware) -> dict[str, Any]:
    """Memory and seconds of one process that scores, with all layers in memory and layer by layer."""
    calibration = config.calibration
    layout = scoring_layout(config, cuda=machine.cuda, runtime_bytes=machine.reserved_bytes)
    tokens = calibration.num_samples * calibration.seq_length
    chunk_tokens = min(calibration.chunk_tokens, tokens)
    flops = forward_flops_per_token(teacher, calibration.seq_length) * tokens
    memory = {
        name: score_bytes(teacher, layout, chunk_tokens=chunk_tokens, streamed=streamed)
        for name, streamed in (("resident", False), ("streamed", True))
    }
    ways = {True: ["streamed"], False: ["resident"], None: ["resident", "streamed"]}[calibration.streamed]
    chosen = min((memory[way] for way in ways), key=lambda parts: parts["total"])
    return {
        "tokens": tokens,
        "precision": calibration.precision_on(machine.cuda).value,
        "flops": flops,
        "seconds": score_seconds(teacher, machine, layout, tokens),
        "memory_bytes": memory,
        "fits": chosen["total"] <= machine.memory_bytes,
    }


def scoring_layout(config: Config, *, cuda: bool, runtime_bytes: int) -> Layout:
    """One forward pass of scoring."""
    weight_bytes = BF16 if config.calibration.precision_on(cuda) is Precision.bf16 else FP32
    return Layout(
        tp=config.parallel.tensor_model_parallel_size,
        micro_batch_size=config.calibration.micro_batch_size,
        seq_length=config.calibration.seq_length,
        weight_bytes=weight_bytes,
        teacher_weight_bytes=weight_bytes,
        cuda=cuda,
        runtime_bytes=runtime_bytes,
    )


def repair_tokens(config: Config) -> int:
    """Tokens that rotation and repair are fitted on: no more than there are for calibration."""
    return min(config.prune.repair_tokens, config.calibration.num_samples * config.calibration.seq_length)


def least_tokens(student: Shape) -> int:
    """Tokens that the least squares of a repair need, by the inputs of the student's widest linear."""
    return TOKENS_PER_INPUT * max(student.axis_size("q"), student.ffn_hidden_size, student.hidden_size)


def slicing(config: Config, teacher: Shape, student: Shape, machine: Hardware) -> dict[str, Any]:
    """Memory and seconds of the process that slices, the bytes that it reads and writes, and memory of a repair."""
    prune, tokens = config.prune, repair_tokens(config)
    layout = scoring_layout(config, cuda=machine.cuda, runtime_bytes=machine.reserved_bytes)
    repairs = prune.rotate or prune.repairs
    weight_bytes = file_weight_bytes(config)
    read, written = rows_read(teacher, student) * weight_bytes, parameters(student)["parameters"] * weight_bytes
    return {
        "read_bytes": read,
        "written_bytes": written,
        "memory_bytes": slice_bytes(teacher, weight_bytes),
        "seconds": slice_seconds(read, written, machine),
        "repair_tokens": tokens if repairs else 0,
        "repair_bytes": repair_bytes(teacher, student, prune, layout, tokens=tokens) if repairs else None,
    }


def rows_read(teacher: Shape, student: Shape) -> int:
    """Elements that slicing reads: the rows that the student keeps, as wide as the teacher's."""
    table = architecture(student.architecture)
    wide = table.tensors(teacher)
    return sum(size[0] * prod(wide[name][1:]) for name, size in table.tensors(student).items())


def disk_bytes(config: Config, teacher: Shape, student: Shape) -> dict[str, int]:
    """What the output folder grows to; a checkpoint more than `keep` exists while the oldest is being replaced.

    A pretrained teacher and its first weights are fp32. Beside it (`cache`), copies of compressed text in data.cache_dir.
    """
    weight_bytes, pretrained = file_weight_bytes(config), config.teacher.is_pretrained
    own, taught = parameters(student)["parameters"], parameters(teacher)["parameters"]
    made = config.teacher.source and config.teacher.path is None
    num_kept = config.checkpoint.keep + config.checkpoint.keep_best + 1
    parts = {
        "pretraining": taught * (FP32 + checkpoint_bytes(config) * num_kept) if pretrained else 0,
        "teacher": taught * (FP32 if pretrained else weight_bytes) if made else 0,
        "pruned": own * weight_bytes,
        "checkpoints": own * checkpoint_bytes(config) * num_kept,
        "student": own * export_weight_bytes(config),
    }
    each = {"checkpoint": own * checkpoint_bytes(config), "cache": copied_bytes(config.data)}
    return parts | {"total": sum(parts.values())} | each


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one parameter in a training checkpoint: the weight, AdamW's moments, the fp32 weight beside a bf16 one."""
    weight_bytes = file_weight_bytes(config)
    return weight_bytes + 2 * FP32 + (FP32 if weight_bytes == BF16 else 0)


def export_weight_bytes(config: Config) -> int:
    """Bytes of one weight in the exported folder."""
    if config.export.dtype is None:
        return file_weight_bytes(config)
    return FP32 if config.export.dtype is ExportDtype.float32 else BF16


def file_weight_bytes(config: Config) -> int:
    """Bytes of one weight in Hugging Face folders and checkpoints."""
    return BF16 if config.train.precision is Precision.bf16 else FP32
