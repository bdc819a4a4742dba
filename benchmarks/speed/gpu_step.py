"""Tokens per second, memory and utilisation of a full-size distillation step on one GPU, compared with `plan`.

    python benchmarks/speed/gpu_step.py [--quick] [--json FILE] [--teacher nemotron4_15b] [--micro-batch-size 1] [--accumulate 8]

Teacher and student have random weights and tokens: neither time nor memory depends on their values. The step is the
trainer's own (distillation.step.Objective, train.optim.Optimizer) without data, checkpoints and logging.
JSON keys: tokens_per_second, utilisation (model FLOPs over wall time x measured bf16 GEMM rate), peak_gib, loss_gib, loss_peak_u.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from minitron_train.arch import Shape, architecture
from minitron_train.commands.recipes import home
from minitron_train.config import DistillConfig, ModelConfig, ParallelConfig, Precision, TrainConfig
from minitron_train.data.stream import Batch
from minitron_train.distillation.loss_memory import LossMemory
from minitron_train.distillation.step import Objective, loss_spec
from minitron_train.model.build import LanguageModel, build
from minitron_train.parallel.groups import Groups, start
from minitron_train.planning.counts import forward_flops_per_token, training_flops_per_token
from minitron_train.planning.hardware import gemm_flops
from minitron_train.runtime.launch import read_world
from minitron_train.train.optim import Optimizer, student_arguments

STUDENT_4B = {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24}
QUICK = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "vocab_size": 8192}


def teacher_shape(name: str, quick: bool) -> Shape:
    """A shape of conf/model."""
    section: Any = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(home() / "conf" / "model" / f"{name}.yaml")
    )
    names = [name for name in Shape.__dataclass_fields__ if name in section]
    values: dict[str, Any] = {name: section[name] for name in names} | (QUICK if quick else {})
    return Shape(**values)


@torch.no_grad()
def random_model(shape: Shape, **arguments) -> LanguageModel:
    """A model with random weights, drawn on the device."""
    model = build(shape, **arguments)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.01)
    return model


def random_batch(shape: Shape, train: TrainConfig, groups: Groups) -> Batch:
    size = (train.micro_batch_size, train.seq_length + 1)
    tokens = torch.randint(shape.vocab_size, size, device=groups.device)
    mask = torch.ones(train.micro_batch_size, train.seq_length, device=groups.device)
    return Batch(
        tokens_BS=tokens[:, :-1],
        labels_BS=tokens[:, 1:],
        mask_BS=mask,
        documents_BS=None,
        sources={},
    )


def now_s() -> float:
    """The clock, after the GPU has finished its queue."""
    torch.cuda.synchronize()
    return time.perf_counter()


def gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 2)


def measure(options: argparse.Namespace, groups: Groups) -> dict:
    quick = options.quick
    train = TrainConfig(
        precision=Precision.bf16,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * options.accumulate,
        seq_length=128 if quick else options.seq_length,
        distributed_optimizer=False,
    )
    teacher_is = teacher_shape(options.teacher, quick)
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256} if quick else STUDENT_4B
    student_is = teacher_is.smaller(**sizes)
    teacher = random_model(teacher_is, dtype=torch.bfloat16).requires_grad_(False).eval()
    optimizer = Optimizer(random_model(student_is, **student_arguments(train)), train)
    objective = Objective(
        student=optimizer.model,
        teacher=teacher,
        spec=loss_spec(DistillConfig(), has_teacher=True),
        memory=LossMemory(DistillConfig()),
        groups=groups,
    )
    weights = torch.cuda.memory_allocated()
    batch = random_batch(teacher_is, train, groups)
    tokens = batch.tokens_BS.numel()
    forward_backward, update = [], []
    for _ in range(options.warmup + options.steps):
        start_s = now_s()
        optimizer.zero_grad()
        for k in range(options.accumulate):
            with optimizer.no_sync() if k < options.accumulate - 1 else contextlib.nullcontext():
                (objective(batch).total / (tokens * options.accumulate)).backward()
        middle_s = now_s()
        optimizer.step(1e-5, optimizer.gradient_norm())
        forward_backward.append(middle_s - start_s)
        update.append(now_s() - middle_s)
    median_s = [statistics.median(part[options.warmup :]) for part in (forward_backward, update)]
    seconds, tokens = sum(median_s), tokens * options.accumulate
    peak_bytes = torch.cuda.max_memory_allocated()
    loss = loss_memory(objective, batch)
    flops = forward_flops_per_token(teacher_is, train.seq_length) + training_flops_per_token(
        student_is, train.seq_length
    )
    rate = gemm_flops(Precision.bf16, cuda=True)
    counts = [sum(architecture(s.architecture).parameters(s).values()) for s in (teacher_is, student_is)]
    return {
        "device": torch.cuda.get_device_name(),
        "teacher_parameters": counts[0],
        "student_parameters": counts[1],
        "seq_length": train.seq_length,
        "micro_batch_size": train.micro_batch_size,
        "accumulate": options.accumulate,
        "step_seconds": round(seconds, 4),
        "optimizer_seconds": round(median_s[1], 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "utilisation": round(flops * tokens / seconds / rate, 3),
        "gemm_tflops": round(rate / 1e12, 1),
        "resident_gib": gib(weights),
        "peak_gib": gib(peak_bytes),
        **{f"loss_{key}": value for key, value in loss.items()},
        "torch": torch.__version__,
    }


def loss_memory(objective: Objective, batch: Batch) -> dict:
    """Memory of the fused loss beyond hidden states, weights and their gradients, and the size of one [N, V] fp32 tensor."""
    from minitron_train.distillation.loss import distillation_loss

    student: Any = objective.student.module
    teacher = objective.teacher
    assert teacher is not None
    with torch.no_grad():
        student_NH, teacher_NH = student(batch.tokens_BS).flatten(0, 1), teacher(batch.tokens_BS).flatten(0, 1)
    student_NH.requires_grad_(True)
    weight = student.output_weight.detach().requires_grad_(True)
    for _ in range(3):  # the last repeat counts
        student_NH.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start_s = torch.cuda.memory_allocated(), now_s()
        distillation_loss(student_NH, weight, teacher_NH, teacher.output_weight, loss=objective.spec).total.backward()
        seconds = now_s() - start_s
    gradients = student_NH.nbytes + weight.nbytes
    unit = 4 * student_NH.shape[0] * weight.shape[0]
    beyond = torch.cuda.max_memory_allocated() - before - gradients
    return {"gib": gib(beyond), "peak_u": round(beyond / unit, 3), "seconds": round(seconds, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--teacher", default="nemotron4_15b")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=8, help="micro batches per optimizer step")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    with start(ParallelConfig(), read_world(), seed=1) as groups:
        found = measure(options, groups)
    for key, value in found.items():
        print(f"{key:<20} {value}")
    if options.json:
        options.json.write_text(json.dumps(found | {"cases": [found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
