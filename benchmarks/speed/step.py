"""Fraction of the machine's matrix rate that a distillation step reaches, and the time of its parts.

    python benchmarks/speed/step.py [--quick] [--json FILE]

A 57 M teacher and a 28 M student of the Nemotron architecture, vocabulary 8192, sequences of 256 tokens. Utilisation is
the model's FLOPs (teacher forward, student forward and backward; causal attention counted at half) over wall seconds times
the rate of matrix products, which this process measures in the same minute. Data, loss, optimizer and logging are
included. `checkpoint_stall` is the loop's time for one asynchronous save over the default interval between saves.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # before torch

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minitron_train.arch import Shape, architecture
from minitron_train.config import CheckpointConfig, Config, ModelConfig, TrainConfig, WandbMode
from minitron_train.hf import HFFolder
from minitron_train.parallel.groups import start
from minitron_train.planning.counts import forward_flops_per_token, training_flops_per_token
from minitron_train.runtime.launch import read_world
from minitron_train.train.assemble import assemble
from minitron_train.train.loop import Trainer
from minitron_train.train.pretrain import write_initial
from minitron_train.train.run import open_reporter

SEQ_LENGTH, BATCH, VOCAB, WARMUP_STEPS, GEMM_SIZE = 256, 8, 8192, 2, 2048
TEACHER = Shape(
    architecture="nemotron",
    num_layers=7,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=VOCAB,
    rotary_percent=0.5,
)
STUDENT = TEACHER.smaller(hidden_size=512, num_attention_heads=8, ffn_hidden_size=1920)
PARTS = ("data", "teacher forward", "student forward", "loss and backward", "optimizer", "logging", "checkpoint")

Seconds = dict[str, float]


def main() -> None:
    """Measure one process with all cores, then two tensor-parallel ranks on the same cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, within a minute")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # run as one of the two ranks, in this folder
    arguments = parser.parse_args()
    num_steps = 4 if arguments.quick else 12
    if arguments.measure:
        measure(arguments.measure, num_steps)
        return
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        folder = Path(name)
        for model, shape in (("teacher", TEACHER), ("student", STUDENT)):
            write_initial(make_config(folder, 1), shape, folder / model)
            size = sum(architecture("nemotron").parameters(shape).values())
            print(f"{model}: {size / 1e6:.1f} M parameters", flush=True)
        ours = [sys.executable, "-W", "ignore", __file__, *(["--quick"] if arguments.quick else []), "--measure", name]
        subprocess.run(ours, check=True)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *ours[3:]]
        subprocess.run(launch, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        whole, split = (json.loads((folder / f"tp{tp}.json").read_text()) for tp in (1, 2))
    result = {
        "utilisation": whole["utilisation"],
        "gemm_gflops": whole["gemm_gflops"],
        "tp2_ratio": whole["step_s"] / split["step_s"],
        "checkpoint_stall": whole["checkpoint_stall"],
        "cases": [whole, split],
    }
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def make_config(folder: Path, tp: int) -> Config:
    """Configuration of the measured run."""
    config = Config(name="step", output_dir=str(folder), model=ModelConfig(init_std=0.02))
    config.train = TrainConfig(
        num_tokens=1000 * BATCH * SEQ_LENGTH, global_batch_size=BATCH, micro_batch_size=BATCH, seq_length=SEQ_LENGTH
    )
    config.data.validation_tokens = SEQ_LENGTH
    config.tracking.wandb.mode = WandbMode.disabled
    config.parallel.tensor_model_parallel_size = tp
    return config


def measure(folder: Path, num_steps: int) -> None:
    """Time the parts of some steps of the trainer; rank 0 writes tpN.json."""
    world = read_world()
    config, target = make_config(folder, world.size), folder / f"run{world.size}"
    with start(config.parallel, world, config.seed) as groups, contextlib.ExitStack() as stack:
        files = (HFFolder(folder / "student"), HFFolder(folder / "teacher"))
        trainer = assemble(config, groups, *files, target, stack)
        if groups.is_first:
            trainer.reporter = open_reporter(config, trainer, target)
        rates, steps = [], []
        with watched(trainer) as seconds:
            for _ in range(WARMUP_STEPS + num_steps):
                steps.append(timed_step(trainer, seconds, save=False))
                rates += [gemm_gflops() for _ in range(3)]
            step_s = statistics.median(step["total"] for step in steps[WARMUP_STEPS:])
            stall_s = save_stall(trainer, seconds, step_s)
        if not groups.is_first:
            return
        flops = forward_flops_per_token(TEACHER, SEQ_LENGTH) + training_flops_per_token(STUDENT, SEQ_LENGTH)
        gflop, rate = flops * BATCH * SEQ_LENGTH / 1e9, statistics.median(rates) * world.size
        case = {
            "tensor_model_parallel_size": world.size,
            "threads_per_rank": torch.get_num_threads(),
            "step_s": step_s,
            "tokens_per_second": BATCH * SEQ_LENGTH / step_s,
            "gemm_gflops": rate,
            "model_gflop_per_step": gflop,
            "utilisation": gflop / (step_s * rate),
            "checkpoint_stall": stall_s / (CheckpointConfig().interval_steps * step_s),
            "parts_s": {part: statistics.median(step[part] for step in steps[WARMUP_STEPS:]) for part in PARTS[:-1]},
            "save_s": stall_s,
        }
        (folder / f"tp{world.size}.json").write_text(json.dumps(case))


def timed_step(trainer: Trainer, seconds: Seconds, *, save: bool) -> Seconds:
    """Run one step as the loop does; return the seconds of its parts."""
    seconds.clear()
    begin_s = time.perf_counter()
    batch = trainer.stream.next_batch(BATCH)
    data_s = time.perf_counter()
    row = trainer.forward_backward(batch)
    backward_s = time.perf_counter()
    row |= trainer.update(row, batch)
    update_s = time.perf_counter()
    trainer.reporter.report(trainer.state.step, row)
    trainer.groups.any(False)  # the loop asks for signals here
    report_s = time.perf_counter()
    trainer.config.checkpoint.interval_steps = trainer.state.step if save else 1_000_000
    trainer.save_if_due(last=False)
    end_s = time.perf_counter()
    forward_s = seconds["teacher forward"] + seconds["student forward"]
    return {
        **seconds,
        "data": data_s - begin_s,
        "loss and backward": backward_s - data_s - forward_s,
        "optimizer": update_s - backward_s,
        "logging": report_s - update_s,
        "checkpoint": end_s - report_s,
        "total": end_s - begin_s,
    }


def save_stall(trainer: Trainer, seconds: Seconds, step_s: float) -> float:
    """Seconds that one save costs: in its own step, and in the slower steps while it is written."""
    lost_s = timed_step(trainer, seconds, save=True)["total"] - step_s
    while trainer.groups.any(trainer.checkpoints.writing is not None):
        lost_s += timed_step(trainer, seconds, save=False)["total"] - step_s
    return max(lost_s, 0.0)


@contextlib.contextmanager
def watched(trainer: Trainer) -> Iterator[Seconds]:
    """Within this block both models record the seconds of their forward passes."""
    seconds: Seconds = defaultdict(float)
    begin: Seconds = {}
    handles = []
    for name, model in (("teacher forward", trainer.objective.teacher), ("student forward", trainer.objective.student)):
        assert model is not None

        def before(*_: Any, name: str = name) -> None:
            begin[name] = time.perf_counter()

        def after(*_: Any, name: str = name) -> None:
            seconds[name] += time.perf_counter() - begin[name]

        handles += [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    yield seconds
    for handle in handles:
        handle.remove()


def gemm_gflops() -> float:
    """Rate of one square fp32 product with this process's threads."""
    left, right, out = (torch.ones(GEMM_SIZE, GEMM_SIZE) for _ in range(3))
    begin_s = time.perf_counter()
    torch.mm(left, right, out=out)
    return 2 * GEMM_SIZE**3 / (time.perf_counter() - begin_s) / 1e9


def show(result: dict[str, Any]) -> None:
    whole, split = result["cases"]
    print(f"{'':20}{'one process':>14}{'two ranks, TP 2':>18}")
    for part in PARTS[:-1]:
        one, two = whole["parts_s"][part], split["parts_s"][part]
        print(f"{part:20}{one:10.3f} s {one / whole['step_s']:3.0%}{two:12.3f} s {two / split['step_s']:3.0%}")
    for key, unit in (
        ("step_s", "s"),
        ("tokens_per_second", "/s"),
        ("gemm_gflops", "GF/s"),
        ("utilisation", ""),
        ("save_s", "s"),
    ):
        print(f"{key:20}{whole[key]:10.3f} {unit:4}{split[key]:12.3f} {unit}")
    print(
        f"TP 2 reaches {result['tp2_ratio']:.2f} of one process; a save costs {result['checkpoint_stall']:.2%} of its interval"
    )


if __name__ == "__main__":
    main()
