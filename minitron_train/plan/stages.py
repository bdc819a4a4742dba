"""Scoring, slicing and disk."""

from typing import Any

from minitron_train.arch import Shape
from minitron_train.config import CalibrationConfig, Config, Precision
from minitron_train.plan.counts import (
    forward_flops_per_token,
    largest_row,
    layer_parameters,
    parameters,
    parameters_per_rank,
)
from minitron_train.plan.hardware import Hardware
from minitron_train.plan.memory import FP32, Layout, forward_bytes

BF16 = 2


def scoring(config: Config, teacher: Shape, machine: Hardware) -> dict[str, Any]:
    """Memory and seconds of one process that scores, with the whole teacher in memory and layer by layer."""
    calibration, tp = config.calibration, config.parallel.tensor_model_parallel_size
    weight_bytes = weights_of(config, machine)
    layout = Layout(
        tp=tp,
        micro_batch_size=calibration.micro_batch_size,
        seq_length=calibration.seq_length,
        weight_bytes=weight_bytes,
    )
    tokens = calibration.num_samples * calibration.seq_length
    flops = forward_flops_per_token(teacher, calibration.seq_length) * tokens
    working = forward_bytes(teacher, layout)
    statistics = statistics_bytes(teacher, calibration)
    resident = parameters_per_rank(teacher, tp) * weight_bytes + working + statistics
    chunk = min(calibration.chunk_tokens, tokens) * teacher.hidden_size * weight_bytes
    streamed = max(layer_parameters(teacher), largest_row(teacher)) * weight_bytes + chunk + working + statistics
    return {
        "tokens": tokens,
        "flops": flops,
        "seconds": flops / tp / machine.flops,
        "memory_bytes": {"resident": resident, "streamed": streamed, "reserved": machine.reserved_bytes},
        "fits": resident + machine.reserved_bytes <= machine.memory_bytes,
    }


def statistics_bytes(teacher: Shape, calibration: CalibrationConfig) -> int:
    """Running sums of the importance: one per head channel, neuron and norm output of every layer, fp32."""
    per_layer = teacher.axis_size("q") + teacher.ffn_hidden_size + 2 * teacher.hidden_size
    return teacher.num_layers * per_layer * FP32


def slicing(config: Config, teacher: Shape, student: Shape, machine: Hardware) -> dict[str, Any]:
    """Bytes that slicing reads and writes."""
    weight_bytes = weights_of(config, machine)
    return {
        "read_bytes": parameters(teacher)["parameters"] * weight_bytes,
        "written_bytes": parameters(student)["parameters"] * weight_bytes,
    }


def disk_bytes(config: Config, teacher: Shape, student: Shape) -> dict[str, int]:
    """What the output folder grows to: checkpoints hold weights and optimizer state; one more exists while one is replaced."""
    weight_bytes = BF16 if config.train.precision is Precision.bf16 else FP32
    own = parameters(student)["parameters"]
    checkpoint = own * (weight_bytes + 8 + (FP32 if weight_bytes == BF16 else 0))
    parts = {
        "teacher": parameters(teacher)["parameters"] * weight_bytes if config.teacher.source else 0,
        "pruned": own * weight_bytes,
        "checkpoint": checkpoint,
        "checkpoints": checkpoint * (config.checkpoint.keep + 1),
        "student": own * weight_bytes,
    }
    return parts | {"total": sum(value for name, value in parts.items() if name != "checkpoint")}


def weights_of(config: Config, machine: Hardware) -> int:
    """Bytes of one weight."""
    return BF16 if config.train.precision is Precision.bf16 and machine.cuda else FP32
