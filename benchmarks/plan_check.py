"""The plan beside what was measured on this machine: peak memory and time of scoring, slicing and distilling.

    python benchmarks/plan_check.py [--quick] [--json FILE] [--teacher FOLDER] [--only TEXT]

Each case runs in fresh processes, so that the peak (VmHWM) is its own. Times are medians of five, and the rates of a matrix
product and of a copy are measured between the repeats, on one thread like the work itself, so that a machine shared with
others does not make the plan look wrong. FOLDER is SmolLM2-135M-Instruct as the quickstart leaves it
(outputs/smollm2/teacher); `--quick` needs none.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from hydra import compose, initialize_config_dir

from minitron_train import cli
from minitron_train.arch import Shape
from minitron_train.config import Config
from minitron_train.parallel.launch import World, read_world
from minitron_train.plan.hardware import hardware
from minitron_train.plan.reckon import reckon
from minitron_train.workspace import STUDENT_SIZES, shape_of_recipe


@dataclass(frozen=True, slots=True)
class Case:
    """One stage of one recipe."""

    recipe: str
    stage: str
    tp: int = 1

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.stage} {self.recipe} TP {self.tp}"


CASES = [
    *(Case("tiny", stage, tp) for stage in ("score", "distill") for tp in (1, 2)),
    Case("tiny", "slice"),
    *(Case("smollm2", stage) for stage in ("score", "slice", "distill")),
]


def configuration(case: Case) -> Config:
    """The recipe, shortened to what is repeated."""
    cli.register_recipes()
    overrides = [
        f"+recipe={case.recipe}",
        f"parallel.tensor_model_parallel_size={case.tp}",
        "tracking.wandb.mode=disabled",
    ]
    overrides += [
        "calibration.num_samples=16",
        "data.validation_tokens=2048",
        "prune.refit=none",
        "prune.norm_scale=false",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.home() / "conf")):
        return cli.to_config(compose("config", overrides=overrides))


def shapes(config: Config) -> tuple[Shape, Shape]:
    """Teacher's and student's, from the recipe."""
    teacher = shape_of_recipe(config)
    assert teacher is not None
    return teacher, teacher.smaller(**{size: getattr(config.student, size) for size in STUDENT_SIZES})


# in the measuring processes


def peak_bytes() -> int:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def repeated(
    work: Callable[[], None], rates: Callable[[], tuple[float, float]], repeats: int, warmup: int
) -> dict[str, Any]:
    """The peak of the first times, then seconds of each repeat beside the rates of matrix products and of memory around it."""
    for _ in range(warmup):
        work()
    peak = peak_bytes()  # before the rates are measured, which takes memory too
    before, seconds, found = rates(), [], []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start_s)
        after = rates()
        found.append([(a + b) / 2 for a, b in zip(before, after, strict=True)])
        before = after
    return {"seconds": seconds, "rates": found, "peak_bytes": peak}


def measure(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """Run one case in this process. The first repeats warm up caches and allocators and are not counted."""
    import torch

    from minitron_train.hf import Checkpoint
    from minitron_train.parallel import groups
    from minitron_train.plan.hardware import copy_rate, gemm_flops
    from minitron_train.prune.cut import cut
    from minitron_train.prune.score import score
    from minitron_train.train.run import assemble

    config, cuda = configuration(case), torch.cuda.is_available()
    teacher, scratch = Checkpoint(folder / "teacher"), folder / "scratch"
    torch.manual_seed(0)
    size = (1, config.calibration.num_samples, config.calibration.seq_length)
    tokens = torch.randint(0, teacher.shape.vocab_size, size)

    def rates() -> tuple[float, float]:
        return gemm_flops(config.train.precision, cuda), copy_rate(cuda)

    with groups.start(config.parallel, read_world(), seed=1) as g, ExitStack() as stack:
        if case.stage == "score":
            work = functools.partial(score, config, g, teacher=teacher, tokens=tokens, folder=scratch)
            return repeated(work, rates, repeats, warmup=1)
        if case.stage == "slice":
            target, scores = shapes(config)[1], scratch / "scores.safetensors"

            def work() -> None:
                with tempfile.TemporaryDirectory(dir=scratch) as out:
                    cut(
                        config,
                        g,
                        teacher=teacher,
                        student=target,
                        scores=scores,
                        tokens=lambda: tokens,
                        folder=Path(out),
                    )

            return repeated(work, rates, repeats, warmup=1)
        trainer = assemble(config, g, Checkpoint(folder / "student"), teacher, scratch, stack)

        def work() -> None:
            batch = trainer.stream.next_batch(config.train.global_batch_size)
            trainer.update(trainer.forward_backward(batch), batch)

        return repeated(work, rates, repeats, warmup=2)


def prepare(recipe: str, folder: Path, teacher: Path | None) -> None:
    """A teacher (given, or with random weights), scores and a student, for the cases of one recipe."""
    import torch

    from minitron_train.hf import Checkpoint
    from minitron_train.parallel import groups
    from minitron_train.pretrain import write_initial
    from minitron_train.prune.cut import cut
    from minitron_train.prune.score import score

    config = configuration(Case(recipe, "score"))
    (folder / "scratch").mkdir(parents=True)
    if teacher is not None:
        (folder / "teacher").symlink_to(teacher.resolve())
    else:
        (folder / "teacher").mkdir()
        write_initial(config, shapes(config)[0], folder / "teacher")
    files, scores = Checkpoint(folder / "teacher"), folder / "scratch" / "scores.safetensors"
    with groups.start(config.parallel, World(), seed=1) as g:
        tokens = torch.randint(0, files.shape.vocab_size, (1, 2, 64))
        score(config, g, teacher=files, tokens=tokens, folder=scores.parent)
        (folder / "student").mkdir()
        target = shapes(config)[1]
        cut(config, g, teacher=files, student=target, scores=scores, tokens=lambda: tokens, folder=folder / "student")


# in the process that compares


def run(job: dict[str, Any], num_ranks: int) -> list[dict[str, Any]]:
    """A job in fresh processes that share the cores; one result per rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
        env["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate() for process in ranks]
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, f"{job} failed:\n{errors[-2000:]}"
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def predict(case: Case, rates: tuple[float, float]) -> tuple[dict[str, int], float]:
    """Memory by part and seconds of one repeat, as the plan reckons them with these rates."""
    config = configuration(case)
    cluster = replace(config.cluster, gpus_per_node=case.tp, memory_gib=1.0, memory_gb_per_s=rates[1] / 1e9)
    machine = replace(hardware(cluster, config.train.precision), peak_flops=rates[0], fp32_flops=rates[0])
    result = reckon(replace(config, cluster=cluster), *shapes(config), machine)
    if case.stage == "distill":
        return result["configured"]["memory_bytes"], result["configured"]["step_seconds"]["total"]
    stage = result["scoring" if case.stage == "score" else "slicing"]
    return stage["memory_bytes"].get("resident", stage["memory_bytes"]), stage["seconds"]


def compare(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """One row of the table: the rank with the larger peak, the median over the repeats."""
    found = run({"case": asdict(case), "folder": str(folder), "repeats": repeats}, case.tp)
    worst = max(found, key=lambda rank: rank["peak_bytes"])
    pairs = [
        (predict(case, tuple(rates))[1], seconds)
        for rates, seconds in zip(worst["rates"], worst["seconds"], strict=True)
    ]
    parts, _ = predict(case, tuple(worst["rates"][0]))
    planned_s, measured_s = (median(values) for values in zip(*pairs, strict=True))
    return {
        "case": case.name,
        "planned_bytes": parts["total"],
        "measured_bytes": worst["peak_bytes"],
        "memory_error": abs(parts["total"] / worst["peak_bytes"] - 1),
        "beyond_libraries_error": (parts["total"] - worst["peak_bytes"]) / (parts["total"] - parts["runtime"]),
        "planned_seconds": planned_s,
        "measured_seconds": measured_s,
        "time_error": abs(median(planned / measured for planned, measured in pairs) - 1),
        "parts": parts,
        **worst,
    }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny alone, two repeats")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("outputs/smollm2/teacher"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        if "prepare" in job:
            prepare(job["prepare"], Path(job["folder"]), Path(job["teacher"]) if job["teacher"] else None)
            print("{}")
        else:
            print(json.dumps(measure(Case(**job["case"]), Path(job["folder"]), job["repeats"])), flush=True)
        return
    repeats = options.repeats or (2 if options.quick else 5)
    recipes = ("tiny",) if options.quick else ("tiny", "smollm2")
    rows = []
    print(f"{'':<22}{'planned':>10}{'measured':>10}{'error':>8}{'planned':>10}{'measured':>10}{'error':>8}")
    with tempfile.TemporaryDirectory() as base:
        for recipe in recipes:
            teacher = str(options.teacher) if recipe == "smollm2" else None
            run({"prepare": recipe, "folder": f"{base}/{recipe}", "teacher": teacher}, 1)
            for case in (case for case in CASES if case.recipe == recipe and options.only in case.name):
                rows.append(row := compare(case, Path(base) / recipe, repeats))
                planned, measured = (row[key] / 2**20 for key in ("planned_bytes", "measured_bytes"))
                memory = f"{planned:>6.0f} MiB{measured:>6.0f} MiB{row['memory_error']:>8.1%}"
                seconds = f"{row['planned_seconds']:>8.2f} s{row['measured_seconds']:>8.2f} s{row['time_error']:>8.1%}"
                print(f"{row['case']:<22}{memory}{seconds}", flush=True)
    worst = {f"worst_{key}": max(row[key] for row in rows) for key in ("memory_error", "time_error")}
    print(", ".join(f"{key} {value:.1%}" for key, value in worst.items()))
    if options.json:
        options.json.write_text(json.dumps(worst | {"cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
