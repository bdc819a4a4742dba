"""The plan compared with distillation steps on one GPU: the 8B teacher's and the 4B student's widths, as many layers as fit.

    python benchmarks/plan/plan_gpu.py [--quick] [--json FILE]

Random weights, bf16, 4096 tokens per sequence. Every layer, the vocabulary and the loss have their true size, so bytes and
FLOPs per layer equal those of a full run. Each case runs in its own process. Keys: `worst_memory_error`,
`utilisation` (of the measured rate of a matrix product, largest case), `layer_utilisation` (the same for the layers added
between two depths), `gemm_tflops`. Without CUDA, or with --quick, a toy shape shows that the benchmark runs.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from minitron_train.arch import Shape
from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.config import Config, DistillConfig, ParallelConfig, Precision, Recompute
from minitron_train.distillation.loss_memory import LossMemory
from minitron_train.distillation.step import Objective, loss_spec
from minitron_train.model.build import LanguageModel, build
from minitron_train.parallel import groups
from minitron_train.planning.counts import forward_flops_per_token, training_flops_per_token
from minitron_train.planning.hardware import gemm_flops
from minitron_train.planning.memory import Layout, distill_bytes
from minitron_train.runtime.launch import World
from minitron_train.train.optim import Optimizer, student_arguments

CUDA = torch.cuda.is_available()
NEMOTRON = {
    "architecture": "nemotron",
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 256_000,
    "kinds": (LayerKind(rope=Rope(percent=0.5)),),
}
TEACHER = Shape(num_layers=32, hidden_size=4096, ffn_hidden_size=16384, num_attention_heads=48, **NEMOTRON)
TOY = {"hidden_size": 128, "ffn_hidden_size": 512, "num_attention_heads": 8, "kv_channels": 32, "vocab_size": 1024}
SMALLER = {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24}
CASES = [(4, 1, "none"), (12, 1, "none"), (4, 2, "none"), (12, 2, "none"), (12, 2, "selective"), (12, 2, "full")]
# layers, sequences, recompute


def fill(model: LanguageModel) -> LanguageModel:
    """Fill the model with random weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def measure(teacher: Shape, student: Shape, config: Config, repeats: int) -> dict[str, Any]:
    """Peak bytes and seconds of a step with one micro-batch."""
    train = config.train
    with ExitStack() as stack:
        g = stack.enter_context(groups.start(ParallelConfig(), World(), seed=1))
        dtype = torch.bfloat16 if train.precision is Precision.bf16 else torch.float32
        taught = fill(build(teacher, dtype=dtype)).requires_grad_(False).eval()
        optimizer = Optimizer(fill(build(student, **student_arguments(train))), train)
        spec = loss_spec(config.distill, has_teacher=True)
        objective = Objective(
            student=optimizer.model, teacher=taught, spec=spec, memory=LossMemory(DistillConfig()), groups=g
        )
        tokens = torch.randint(0, student.vocab_size, (train.micro_batch_size, train.seq_length), device=g.device)
        batch: Any = SimpleNamespace(
            tokens_BS=tokens, labels_BS=tokens, mask_BS=torch.ones_like(tokens), documents_BS=None
        )
        seconds, rates = [], []
        for _ in range(repeats + 2):
            rates.append(gemm_flops(train.precision, CUDA))
            start_s = time.perf_counter()
            optimizer.zero_grad()
            (objective(batch).total / tokens.numel()).backward()
            optimizer.step(1e-4, optimizer.gradient_norm())
            if CUDA:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start_s)
        peak = torch.cuda.max_memory_allocated() if CUDA else 0
        held = torch.cuda.max_memory_reserved() if CUDA else 0
    return {"seconds": median(seconds[2:]), "gemm_flops": median(rates[2:]), "peak_bytes": peak, "reserved_bytes": held}


def compare(layers: int, sequences: int, recompute: str, toy: bool) -> dict[str, Any]:
    """One row: planned and measured figures."""
    teacher = replace(TEACHER, num_layers=layers, **(TOY if toy else {}))
    student = teacher.smaller(**({"hidden_size": 96, "ffn_hidden_size": 256} if toy else SMALLER))
    config, length, width = Config(), 128 if toy else 4096, 2 if CUDA else 4
    train = config.train
    train.micro_batch_size, train.seq_length, train.recompute = sequences, length, Recompute[recompute]
    train.precision = Precision.bf16 if CUDA else Precision.fp32
    layout = Layout(
        micro_batch_size=sequences,
        seq_length=length,
        weight_bytes=width,
        teacher_weight_bytes=width,
        recompute=recompute,
        sharded_optimizer=True,
        cuda=CUDA,
    )
    parts = distill_bytes(teacher, student, layout)
    found = measure(teacher, student, config, repeats=5)
    flops = forward_flops_per_token(teacher, length) + training_flops_per_token(student, length)
    return {
        "layers": layers,
        "sequences": sequences,
        "recompute": recompute,
        "flops": flops * sequences * length,
        "planned_bytes": parts["total"] - parts["runtime"],
        "planned_parts": parts,
        **found,
    }


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    rate = row["flops"] / row["seconds"]
    return (
        f"{row['layers']:>2} layers, {row['sequences']} sequences, recompute {row['recompute']:<9}: "
        f"planned {row['planned_bytes'] / 2**30:.2f} GiB, measured {row['peak_bytes'] / 2**30:.2f} "
        f"(reserved {row['reserved_bytes'] / 2**30:.2f}); {row['seconds']:.3f} s, {rate / 1e12:.1f} TFLOP/s = "
        f"{rate / row['gemm_flops']:.0%} of a matrix product"
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the JSON file."""
    plain = {(row["layers"], row["sequences"]): row for row in rows if row["recompute"] == "none"}
    few, many = plain[min(plain)[0], max(plain)[1]], plain[max(plain)]
    errors = [abs(row["planned_bytes"] / row["peak_bytes"] - 1) for row in rows if row["peak_bytes"]]
    gemm = median(row["gemm_flops"] for row in rows)
    added = (many["flops"] - few["flops"]) / (many["seconds"] - few["seconds"]) if many is not few else None
    return {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "worst_memory_error": max(errors, default=None),
        "utilisation": many["flops"] / many["seconds"] / gemm,
        "layer_utilisation": added and added / gemm,
        "gemm_tflops": gemm / 1e12,
        "cases": rows,
    }


def main() -> None:
    """Measure each case in a fresh process; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    toy = options.quick or not CUDA
    if options.case:
        print(json.dumps(compare(**json.loads(options.case), toy=toy)))
        return
    rows = []
    for layers, sequences, recompute in CASES[:1] if toy else CASES:
        case = json.dumps({"layers": layers, "sequences": sequences, "recompute": recompute})
        command = [sys.executable, "-W", "ignore", __file__, "--case", case, *(["--quick"] if toy else [])]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(summary(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
