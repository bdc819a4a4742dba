"""Cost of scoring and slicing, and the disk space of an output folder."""

from math import prod
from typing import Any

from minitron_train.arch import Shape, architecture
from minitron_train.config import Config, ExportDtype, Precision, TeachKind
from minitron_train.config.teach import most_sample_bytes
from minitron_train.planning.counts import forward_flops_per_token, parameters
from minitron_train.planning.hardware import Hardware
from minitron_train.planning.memory import FP32, WEIGHT_BYTES, Layout, repair_bytes, score_bytes, slice_bytes
from minitron_train.planning.timing import score_seconds, slice_seconds

TOKENS_PER_INPUT = 4  # for a repair's least squares; with fewer tokens SmolLM2 gets worse than without the repair


def scoring(config: Config, teacher: Shape, machine: Hardware) -> dict[str, Any]:
    """Estimate memory and seconds of scoring per process, with all layers in memory and streamed layer by layer."""
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
        "precision": calibration.precision.value,
        "flops": flops,
        "seconds": score_seconds(teacher, machine, layout, tokens),
        "memory_bytes": memory,
        "fits": chosen["total"] <= machine.memory_bytes,
    }


def scoring_layout(config: Config, *, cuda: bool, runtime_bytes: int) -> Layout:
    """Return the layout of one forward pass of scoring."""
    weight_bytes = WEIGHT_BYTES[config.calibration.precision]
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
    """Return the number of tokens for rotation and repair, at most the calibration set's."""
    return min(config.prune.repair_tokens, config.calibration.num_samples * config.calibration.seq_length)


def least_tokens(student: Shape) -> int:
    """Return the tokens that a repair's least squares need, from the input width of the student's widest linear layer."""
    neurons = (student.ffn_hidden_size, student.moe_shared_expert_intermediate_size, student.dense_ffn_hidden_size)
    return TOKENS_PER_INPUT * max(student.axis_size("q"), *neurons, student.hidden_size)


def slicing(config: Config, teacher: Shape, student: Shape, machine: Hardware) -> dict[str, Any]:
    """Estimate memory and seconds of slicing, the bytes that it reads and writes, and the memory of a repair."""
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
    """Return the number of elements that slicing reads: the rows that the student keeps, at the teacher's width."""
    table = architecture(student.architecture)
    wide = table.tensors(teacher)
    return sum(size[0] * prod(wide[name][1:]) for name, size in table.tensors(student).items())


def disk_bytes(config: Config, teacher: Shape, student: Shape) -> dict[str, int]:
    """Return the bytes of the output folder by part, with one checkpoint more than are kept (the one being written).

    A pretrained teacher and its initial weights are fp32. `cache` is outside the folder: copies of compressed text in
    data.cache_dir. So may be `teacher_cache`, which `teach` writes: `total` does not contain it.
    """
    from minitron_train.data.sources import copied_bytes  # loads pyarrow, which --help can do without

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
    each["teacher_cache"] = cache_bytes(config, teacher)
    return parts | {"total": sum(parts.values())} | each


def cache_token_bytes(config: Config, teacher: Shape) -> dict[str, float]:
    """Return the bytes of a token in a teacher cache by kind. Of samples it is the most: repeated draws are stored once."""
    teach, weight_bytes = config.teach, WEIGHT_BYTES[config.distill.teacher_precision or config.train.precision]
    return {
        TeachKind.samples.value: most_sample_bytes(teacher.vocab_size, teach.draws, has_weights=teach.has_weights),
        TeachKind.hidden.value: float(teacher.hidden_size * weight_bytes),
    }


def cache_bytes(config: Config, teacher: Shape) -> int:
    """Return the bytes that `teach` writes at most: whole global batches, and the held-out tokens as hidden states."""
    each, train = cache_token_bytes(config, teacher), config.train
    num_steps = -(-(config.teach.num_tokens or train.num_tokens) // train.step_tokens)
    held_out = config.data.validation_tokens * each[TeachKind.hidden]
    return int(num_steps * train.step_tokens * each[config.teach.kind] + held_out)


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes per parameter of a training checkpoint: weight, AdamW's moments, and fp32 master weight for bf16."""
    weight_bytes = file_weight_bytes(config)
    return weight_bytes + 2 * FP32 + (FP32 if weight_bytes < FP32 else 0)


def export_weight_bytes(config: Config) -> int:
    """Return the bytes per weight of the exported folder."""
    if config.export.dtype is None:
        return file_weight_bytes(config)
    return FP32 if config.export.dtype == ExportDtype.float32 else WEIGHT_BYTES[Precision.bf16]


def file_weight_bytes(config: Config) -> int:
    """Return the bytes per weight in Hugging Face folders and checkpoints."""
    return WEIGHT_BYTES[config.train.precision]
