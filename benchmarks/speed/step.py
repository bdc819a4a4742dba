"""Fraction of the machine's matrix rate that a distillation step reaches, and the time of its parts.

    python benchmarks/speed/step.py [--quick] [--json FILE] [--model nemotron] [--precision both] [--baseline FOLDER]

`--model nemotron` is a 57 M teacher and a 28 M student with a vocabulary of 8192, 8 sequences a step; `smollm2` has the shapes
and the batch of recipe smollm2. Weights are random, sequences have 256 tokens. `--precision both` measures fp32 and bf16.
`--baseline` measures the fp32 step of another checkout too. The contestants take their steps in turn, so that ratios hold on a
busy machine. Utilisation is the model's FLOPs (teacher forward, student forward and backward; causal attention counted at half)
over wall seconds times the rate of matrix products of the same precision, measured in the same minute; `utilisation_of_best`
uses the higher rate of both precisions. Data, loss, optimizer and logging are included. `losses_equal`: over the last half of
the steps, bf16 losses differ less from those of fp32 than fp32 losses with another seed do. `checkpoint_stall` is the loop's time
for one asynchronous save over the default interval between saves.
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minitron_train.arch import Shape, architecture
from minitron_train.arch.init import RandomWeights
from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.commands.configuration import compose
from minitron_train.commands.workspace import shape_of_recipe
from minitron_train.config import CheckpointConfig, Config, ModelConfig, Precision, TrainConfig, WandbMode
from minitron_train.data import tokenizers
from minitron_train.hf import HFFolder, write_folder
from minitron_train.model.build import DTYPES
from minitron_train.parallel.groups import start
from minitron_train.planning.counts import forward_flops_per_token, training_flops_per_token
from minitron_train.runtime.launch import read_world
from minitron_train.train.assemble import assemble
from minitron_train.train.loop import Trainer
from minitron_train.train.pretrain import corpus_sample, fresh_config
from minitron_train.train.run import open_reporter

SEQ_LENGTH, BATCH, WARMUP_STEPS, GEMM_SIZE, INIT_STD, VOCAB = 256, 8, 2, 2048, 0.02, 8192
TEACHER = Shape(
    architecture="nemotron",
    num_layers=7,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=VOCAB,
    kinds=(LayerKind(rope=Rope(percent=0.5)),),
)
STUDENT = TEACHER.smaller(hidden_size=512, num_attention_heads=8, ffn_hidden_size=1920)


def of_recipe(name: str) -> tuple[Shape, Shape, int]:
    """The teacher's and the student's shape of a recipe, and its sequences a step."""
    recipe = compose([f"+recipe={name}"])
    teacher = shape_of_recipe(recipe)
    assert teacher is not None
    return teacher, teacher.smaller(**recipe.student.sizes()), recipe.train.global_batch_size


MODELS = {"nemotron": (TEACHER, STUDENT, BATCH), "smollm2": of_recipe("smollm2")}  # teacher, student, sequences a step
PARTS = ("data", "teacher forward", "student forward", "loss and backward", "optimizer", "logging", "checkpoint")
SEED = 1

Seconds = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One process that measures steps, or several tensor-parallel ones."""

    benchmark: str  # step.py of the checkout that is measured
    folder: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    batch: int
    precision: str
    seed: int
    num_steps: int
    in_turns: bool

    def command(self, *launcher: str) -> list[str]:
        """The command line that measures it."""
        script = str(Path(__file__).with_name("step_contestant.py"))
        return [sys.executable, "-W", "ignore", *launcher, script, json.dumps(asdict(self))]

    def result(self, tp: int = 1) -> dict[str, Any]:
        """What it has measured."""
        return json.loads((Path(self.folder) / f"tp{tp}.json").read_text())

    def losses(self) -> list[float]:
        """The loss of every step in turn."""
        lines = (Path(self.folder) / "run1" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines][: WARMUP_STEPS + self.num_steps]


def main() -> None:
    """Measure the contestants in turn with all cores, then two tensor-parallel ranks where the shapes can be split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=MODELS, default="nemotron")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="fp32")
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="another checkout, measured in fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        tokenizer = tokenizers.train_bpe(corpus_sample(Config(name="step").data, SEED), VOCAB)
        for model, shape in zip(("teacher", "student"), MODELS[arguments.model][:2], strict=True):
            write_model(shape, Path(name) / model, tokenizer)
            size = sum(architecture(shape.architecture).parameters(shape).values())
            print(f"{model}: {size / 1e6:.1f} M parameters", flush=True)
        contestants = enter(Path(name), arguments)
        steps_s, rates = race(contestants)
        fastest = "bf16" if "bf16" in contestants else "fp32"
        split = None
        if all(shape.num_query_groups % 2 == 0 for shape in MODELS[arguments.model][:2]):
            split = split_in_two(replace_folder(contestants[fastest], Path(name) / "tp2"))
        result = summary(contestants, steps_s, rates, fastest, split)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def write_model(shape: Shape, folder: Path, tokenizer: Tokenizer) -> None:
    """Write a Hugging Face folder with random weights; the tokenizer may have fewer entries than the vocabulary."""
    tokenizers.save(tokenizer, folder, shape.max_position_embeddings)
    weights = RandomWeights(shape, INIT_STD, SEED)
    tensors = ((name, weights.read(name)) for name in architecture(shape.architecture).tensors(shape))
    bos, eos = (tokenizer.token_to_id(token) for token in (tokenizers.BOS, tokenizers.EOS))
    write_folder(folder, fresh_config(shape, bos, eos, INIT_STD), tensors, tokenizer=None)


def enter(folder: Path, arguments: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants by name, each with a folder of its own that links to both models."""
    entries = {}
    if arguments.baseline:
        files = [arguments.baseline / "benchmarks" / name for name in ("speed/step.py", "step.py")]
        entries["baseline"] = (next(file for file in files if file.exists()), "fp32", SEED)
    for precision in ("fp32", "bf16"):
        if arguments.precision in (precision, "both"):
            entries[precision] = (Path(__file__), precision, SEED)
    if arguments.precision == "both":
        entries["other seed"] = (Path(__file__), "fp32", SEED + 1)
    teacher, student, batch = MODELS[arguments.model]
    return {
        name: Contestant(
            benchmark=str(file.resolve()),
            folder=str(link_models(folder, folder / name)),
            teacher=chosen_fields(teacher),
            student=chosen_fields(student),
            batch=batch,
            precision=precision,
            seed=seed,
            num_steps=4 if arguments.quick else 12,
            in_turns=True,
        )
        for name, (file, precision, seed) in entries.items()
    }


def chosen_fields(shape: Shape) -> dict[str, Any]:
    """The fields without a default value, which older checkouts have too."""
    return {
        field.name: getattr(shape, field.name) for field in fields(shape) if getattr(shape, field.name) != field.default
    }


def link_models(models: Path, folder: Path) -> Path:
    """Make a folder that links to teacher and student; returns it."""
    folder.mkdir()
    for model in ("teacher", "student"):
        (folder / model).symlink_to(models / model)
    return folder


def split_in_two(contestant: Contestant) -> dict[str, Any]:
    """What two tensor-parallel ranks measure."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    subprocess.run(contestant.command(*launcher), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return contestant.result(tp=2)


def replace_folder(contestant: Contestant, folder: Path) -> Contestant:
    """The same contestant in a new folder, without turns."""
    return replace(contestant, folder=str(link_models(folder.parent, folder)), in_turns=False)


def race(contestants: dict[str, Contestant]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Let the contestants take their steps in turn.

    Returns:
        Seconds of each contestant's steps after the warm-up, and the machine's matrix rate by precision, in GFLOP/s.
    """
    running = {
        name: subprocess.Popen(
            entry.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout(Path(entry.benchmark)),  # also where `python -m` of the data workers looks first
            env=os.environ | {"PYTHONPATH": checkout(Path(entry.benchmark))},
        )
        for name, entry in contestants.items()
    }
    steps_s: dict[str, list[float]] = {name: [] for name in running}
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(WARMUP_STEPS + next(iter(contestants.values())).num_steps):
        for name, process in running.items():
            steps_s[name].append(next_step_s(process))
        for precision in ("fp32", "bf16"):
            rates[precision] += [gemm_gflops(Precision(precision)) for _ in range(3)]
    for process in running.values():  # each measures its save alone
        process.communicate("\n")
        assert process.returncode == 0, "a contestant failed; its message is above"
    return (
        {name: found[WARMUP_STEPS:] for name, found in steps_s.items()},
        {precision: statistics.median(found) for precision, found in rates.items()},
    )


def checkout(benchmark: Path) -> str:
    """The folder of the checkout that a benchmark file belongs to."""
    return str(next(folder for folder in benchmark.parents if (folder / "minitron_train").is_dir()))


def next_step_s(process: subprocess.Popen[str]) -> float:
    """Let a contestant take one step; returns its seconds. Lines that are not ours come from its console."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith('{"step_s"'):
            return json.loads(line)["step_s"]
    raise SystemExit("a contestant failed; its message is above")


def summary(
    contestants: dict[str, Contestant],
    steps_s: dict[str, list[float]],
    rates: dict[str, float],
    fastest: str,
    split: dict[str, Any] | None,
) -> dict[str, Any]:
    """The figures of the run; `fastest` names the contestant that the utilisation and the parts are about.

    `split` has those of two ranks, None where the shapes cannot be split.
    """
    whole = contestants[fastest].result()
    result = {
        "precision": fastest,
        "utilisation": whole["utilisation"],
        "gemm_gflops": whole["gemm_gflops"],
        "best_gemm_gflops": max(rates.values()),
        "utilisation_of_best": whole["model_gflop_per_step"] / (whole["step_s"] * max(rates.values())),
        "tp2_ratio": whole["step_s"] / split["step_s"] if split else None,
        "checkpoint_stall": whole["checkpoint_stall"],
        "steps_s": steps_s,
        "cases": [whole, split] if split else [whole],
    }
    if "other seed" in contestants:
        result["speedup_vs_fp32"] = speedup(steps_s["fp32"], steps_s["bf16"])
        result |= compare_losses(*(contestants[name].losses() for name in ("fp32", "bf16", "other seed")))
    if "baseline" in contestants:
        result["speedup_vs_baseline"] = speedup(steps_s["baseline"], steps_s[fastest])
    return result


def speedup(before_s: list[float], after_s: list[float]) -> float:
    """Median ratio of the steps that followed each other."""
    return statistics.median(before / after for before, after in zip(before_s, after_s, strict=True))


def compare_losses(fp32: list[float], bf16: list[float], other_seed: list[float]) -> dict[str, Any]:
    """Mean absolute difference of the last half of the steps' losses, relative to fp32's."""

    def difference(losses: list[float]) -> float:
        pairs = list(zip(fp32, losses, strict=True))[len(fp32) // 2 :]
        return statistics.mean(abs(loss - reference) / reference for reference, loss in pairs)

    precision, seed = difference(bf16), difference(other_seed)
    return {"loss_difference": precision, "loss_difference_of_seeds": seed, "losses_equal": precision < seed}


def make_config(folder: Path, tp: int) -> Config:
    """Configuration of the measured run."""
    config = Config(name="step", output_dir=str(folder), model=ModelConfig(init_std=INIT_STD))
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
                rates += [gemm_gflops(config.train.precision) for _ in range(3)]
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


def gemm_gflops(precision: Precision = Precision.fp32) -> float:
    """Rate of one square product with this process's threads."""
    left, right, out = (torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=DTYPES[precision]) for _ in range(3))
    begin_s = time.perf_counter()
    torch.mm(left, right, out=out)
    return 2 * GEMM_SIZE**3 / (time.perf_counter() - begin_s) / 1e9


def show(result: dict[str, Any]) -> None:
    cases = result["cases"]
    print(f"{'':20}" + "".join(f"{name:>18}" for name in ("one process", "two ranks, TP 2")[: len(cases)]))
    for part in PARTS[:-1]:
        cells = ((case["parts_s"][part], case["parts_s"][part] / case["step_s"]) for case in cases)
        print(f"{part:20}" + "".join(f"{seconds:11.3f} s {share:4.0%}" for seconds, share in cells))
    for key in ("step_s", "tokens_per_second", "gemm_gflops", "utilisation", "save_s"):
        print(f"{key:20}" + "".join(f"{case[key]:13.3f}     " for case in cases))
    print(
        f"best rate {result['best_gemm_gflops']:.0f} GF/s, of which the step uses {result['utilisation_of_best']:.2f}"
    )
    for name in ("speedup_vs_fp32", "losses_equal", "speedup_vs_baseline"):
        if name in result:
            print(f"{name:20}{result[name]:10.2f}")
    if result["tp2_ratio"]:
        print(f"TP 2 reaches {result['tp2_ratio']:.2f} of one process")
    print(f"a save costs {result['checkpoint_stall']:.2%} of its interval")


if __name__ == "__main__":
    main()
