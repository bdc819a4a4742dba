"""The plan compared with measurements on this machine: peak memory and time of scoring, slicing and distilling.

    python benchmarks/plan/plan_check.py [--quick] [--json FILE] [--teacher FOLDER] [--only TEXT] [--repeats N]

Each case runs in fresh processes. Its peak (VmHWM) covers the libraries and the first two runs. Five timed repeats of at
least a second follow. Between them, as many processes as the work uses measure the rates of a matrix product, of a copy
and of an all-reduce. Each repeat is predicted from the rates around it; the error is that of the median of planned /
measured. A process that works alone is timed in CPU seconds, so that time taken by other programs is not an error. Two
ranks wait for each other and are timed by the clock (the table's last column, for all cases).

FOLDER is SmolLM2-135M-Instruct from the quickstart (outputs/smollm2/teacher). `--quick` runs `tiny` alone with two
repeats, `--repeats 0` measures memory alone. JSON keys: worst_memory_error, worst_time_error.
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
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir

from minitron_train.arch import Shape
from minitron_train.commands import recipes
from minitron_train.commands.configuration import to_config
from minitron_train.commands.workspace import shape_of_recipe
from minitron_train.config import ClusterConfig, Config, Precision
from minitron_train.planning.estimate import plan_on
from minitron_train.planning.hardware import Hardware, copy_rate, gemm_flops, hardware, median_seconds
from minitron_train.runtime.launch import World, read_world

if TYPE_CHECKING:
    from minitron_train.parallel.groups import Groups

REPEAT_S = 1.0  # a single process repeats short work until a repeat lasts this long
TIMES = ("seconds", "wall_seconds")
RATES = ("peak_flops", "memory_rate", "intra_node_rate")  # measured fields of planning.hardware.Hardware


@dataclass(frozen=True, slots=True)
class Case:
    """One stage of one recipe."""

    recipe: str
    stage: str
    tp: int = 1

    @property
    def name(self) -> str:
        """Label in the table."""
        return f"{self.stage} {self.recipe} TP {self.tp}"


CASES = [
    *(Case("tiny", stage, tp) for stage in ("score", "distill") for tp in (1, 2)),
    Case("tiny", "slice"),
    *(Case("smollm2", stage) for stage in ("score", "slice", "distill")),
]


def configuration(case: Case) -> Config:
    """The recipe with plain slicing, shortened to what is repeated."""
    recipes.register_recipes()
    overrides = [f"+recipe={case.recipe}", f"parallel.tensor_model_parallel_size={case.tp}", "prune=modelopt"]
    overrides += ["calibration.num_samples=16", "data.validation_tokens=2048", "tracking.wandb.mode=disabled"]
    with initialize_config_dir(version_base="1.3", config_dir=str(recipes.home() / "conf")):
        return to_config(compose("config", overrides=overrides))


def shapes(config: Config) -> tuple[Shape, Shape]:
    """Shapes of teacher and student, from the recipe."""
    teacher = shape_of_recipe(config)
    assert teacher is not None
    return teacher, teacher.smaller(**config.student.sizes())


# ---- in the measuring processes


def peak_bytes() -> int:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def repeated(
    work: Callable[[], None], rates: Callable[[], list[float]], clock: Callable[[], float], repeats: int, alone: bool
) -> dict[str, Any]:
    """The peak of two runs, which warm up caches and allocators; then seconds of each repeat and the rates around it."""
    for _ in range(2):
        start_s = time.perf_counter()
        work()
    times = max(1, round(REPEAT_S / (time.perf_counter() - start_s))) if alone else 1
    found: dict[str, Any] = {"peak_bytes": peak_bytes(), "seconds": [], "wall_seconds": [], "rates": []}
    before = rates() if repeats else []  # measured after the peak, because it takes memory too
    for _ in range(repeats):
        start_s, start = time.perf_counter(), clock()
        for _ in range(times):
            work()
        found["seconds"].append((clock() - start) / times)
        found["wall_seconds"].append((time.perf_counter() - start_s) / times)
        after = rates()
        found["rates"].append([(a + b) / 2 for a, b in zip(before, after, strict=True)])
        before = after
    return found


def all_reduce_rate(g: "Groups", num_elements: int) -> float:
    """Bytes per second that each rank sends in all-reduces of this size (a ring: 2 (tp - 1) / tp of the data)."""
    import torch
    import torch.distributed as dist

    numbers = torch.zeros(num_elements, device=g.device)
    seconds = median_seconds(lambda: dist.all_reduce(numbers, group=g.tp_group), numbers.is_cuda, 9, time.perf_counter)
    return 2 * (g.tp_size - 1) / g.tp_size * numbers.nbytes / seconds


def measure(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """Run one case in this process."""
    import torch

    import minitron_train.commands.registry
    import minitron_train.train.run  # noqa: F401  # the libraries of a command
    from minitron_train.hf import HFFolder
    from minitron_train.parallel import groups

    config, cuda, alone = configuration(case), torch.cuda.is_available(), case.tp == 1
    clock = time.process_time if alone and not cuda else time.perf_counter
    hidden = config.train.micro_batch_size * config.train.seq_length * shapes(config)[0].hidden_size
    with groups.start(config.parallel, read_world(), seed=1) as g, ExitStack() as stack:
        work = STAGES[case.stage](config, g, HFFolder(folder / "teacher"), folder, stack)

        def rates() -> list[float]:
            g.barrier()  # the ranks share the machine, as in the timed work
            link = 1.0 if alone else all_reduce_rate(g, hidden)  # a single process sends nothing
            return [gemm_flops(config.train.precision, cuda, clock=clock), copy_rate(cuda, clock=clock), link]

        return repeated(work, rates, clock, repeats, alone)


def score_work(config: Config, g: "Groups", teacher: Any, folder: Path, stack: ExitStack) -> Callable[[], Any]:
    """Score random tokens once."""
    import torch

    from minitron_train.pruning.scoring import score_checkpoint

    size = (1, config.calibration.num_samples, config.calibration.seq_length)
    tokens = torch.randint(0, teacher.shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    out = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
    return functools.partial(score_checkpoint, config, g, teacher=teacher, tokens=tokens, folder=out)


def no_tokens() -> Any:
    """Calibration tokens, which only repairs need."""
    raise AssertionError("nothing is repaired here")


def slice_work(config: Config, g: "Groups", teacher: Any, folder: Path, stack: ExitStack) -> Callable[[], Any]:
    """Slice once and delete the result."""
    from minitron_train.pruning.prune import prune_checkpoint

    student, scores = shapes(config)[1], folder / "scores.safetensors"

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            prune_checkpoint(
                config, g, teacher=teacher, student=student, scores=scores, tokens=no_tokens, folder=Path(out)
            )

    return work


def distill_work(config: Config, g: "Groups", teacher: Any, folder: Path, stack: ExitStack) -> Callable[[], Any]:
    """One step of the trainer."""
    from minitron_train.hf import HFFolder
    from minitron_train.train.assemble import assemble

    out = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
    trainer = assemble(config, g, HFFolder(folder / "student"), teacher, out, stack)

    def work() -> None:
        batch = trainer.stream.next_batch(config.train.global_batch_size)
        trainer.update(trainer.forward_backward(batch), batch)

    return work


STAGES = {"score": score_work, "slice": slice_work, "distill": distill_work}


def prepare(recipe: str, folder: Path, teacher: Path) -> None:
    """A teacher (given, or with random weights), its scores, and a student for the cases of one recipe."""
    import torch

    from minitron_train.hf import HFFolder
    from minitron_train.parallel import groups
    from minitron_train.pruning.prune import prune_checkpoint
    from minitron_train.pruning.scoring import score_checkpoint
    from minitron_train.train.pretrain import write_initial

    config = configuration(Case(recipe, "score"))
    if recipe == "smollm2":
        (folder / "teacher").symlink_to(teacher.resolve())
    else:
        (folder / "teacher").mkdir()
        write_initial(config, shapes(config)[0], folder / "teacher")
    files, scores, student = HFFolder(folder / "teacher"), folder / "scores.safetensors", shapes(config)[1]
    with groups.start(config.parallel, World(), seed=1) as g:
        score_checkpoint(
            config, g, teacher=files, tokens=torch.randint(0, files.shape.vocab_size, (1, 2, 64)), folder=folder
        )
        (folder / "student").mkdir()
        prune_checkpoint(
            config, g, teacher=files, student=student, scores=scores, tokens=no_tokens, folder=folder / "student"
        )


# ---- in the process that compares


def run(job: dict[str, Any], num_ranks: int) -> list[dict[str, Any]]:
    """Run a job in fresh processes that share the cores; one result per rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
    command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
    ranks = []
    for rank in range(num_ranks):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate() for process in ranks]
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, f"{job} failed:\n{errors[-2000:]}"
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@functools.cache
def this_machine() -> Hardware:
    """The plan's description of this machine, independent of the current rates."""
    return hardware(ClusterConfig(), Precision.fp32)


def predict(case: Case, rates: list[float]) -> tuple[dict[str, int], float]:
    """Memory by part and seconds of one repeat, as the plan estimates them with these rates."""
    config = configuration(case)
    measured = dict(zip(RATES, rates, strict=True)) | {"fp32_flops": rates[0]}
    machine = replace(this_machine(), num_gpus=case.tp, gpus_per_node=case.tp, **measured)
    result = plan_on(machine, config, *shapes(config))
    if case.stage == "distill":
        return result["configured"]["memory_bytes"], result["configured"]["step_seconds"]["total"]
    stage = result["scoring" if case.stage == "score" else "slicing"]
    return stage["memory_bytes"].get("resident", stage["memory_bytes"]), stage["seconds"]


def compare(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """One row of the table: the larger peak of the ranks, and the time of the slower rank."""
    ranks = run({"case": asdict(case), "folder": str(folder), "repeats": repeats}, case.tp)
    peak, parts = max(rank["peak_bytes"] for rank in ranks), predict(case, [1.0, 1.0, 1.0])[0]
    row = {
        "case": case.name,
        "planned_bytes": parts["total"],
        "measured_bytes": peak,
        "memory_error": abs(parts["total"] / peak - 1),
        "parts": parts,
    }
    if not repeats:
        return row
    seconds, wall = ([max(each) for each in zip(*(rank[key] for rank in ranks), strict=True)] for key in TIMES)
    around = zip(*(rank["rates"] for rank in ranks), strict=True)
    rates = [[min(each) for each in zip(*of_ranks, strict=True)] for of_ranks in around]
    planned = [predict(case, of_repeat)[1] for of_repeat in rates]
    ratios = [p / m for p, m in zip(planned, seconds, strict=True)]
    return row | {
        "planned_seconds": median(planned),
        "measured_seconds": median(seconds),
        "time_error": abs(median(ratios) - 1),
        "ratios": ratios,
        "seconds": seconds,
        "wall_seconds": wall,
        "rates": [dict(zip(RATES, of_repeat, strict=True)) for of_repeat in rates],
    }


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    planned, measured = (row[key] / 2**20 for key in ("planned_bytes", "measured_bytes"))
    line = f"{row['case']:<22}{planned:>6.0f} MiB{measured:>6.0f} MiB{row['memory_error']:>8.1%}"
    if "time_error" in row:
        line += f"{row['planned_seconds']:>8.2f} s{row['measured_seconds']:>8.2f} s{row['time_error']:>8.1%}"
        line += f"{median(row['wall_seconds']):>8.2f} s"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only tiny, two repeats")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("outputs/smollm2/teacher"))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        if "prepare" in job:
            prepare(job["prepare"], Path(job["folder"]), Path(job["teacher"]))
            print("{}")
        else:
            print(json.dumps(measure(Case(**job["case"]), Path(job["folder"]), job["repeats"])), flush=True)
        return
    repeats = (2 if options.quick else 5) if options.repeats is None else options.repeats
    chosen = [case for case in CASES if options.only in case.name and (case.recipe == "tiny" or not options.quick)]
    rows = []
    heads = ("planned", "measured", "error")
    print(f"{'':<22}{'{:>10}{:>10}{:>8}'.format(*heads)}{'{:>10}{:>10}{:>8}{:>10}'.format(*heads, 'wall')}")
    with tempfile.TemporaryDirectory() as base:
        for case in chosen:
            folder = Path(base) / case.recipe
            if not folder.exists():
                folder.mkdir()
                run({"prepare": case.recipe, "folder": str(folder), "teacher": str(options.teacher)}, 1)
            rows.append(compare(case, folder, repeats))
            print(show(rows[-1]), flush=True)
    keys = ("memory_error", "time_error") if repeats else ("memory_error",)
    worst = {f"worst_{key}": max(row[key] for row in rows) for key in keys}
    print(", ".join(f"{key} {value:.1%}" for key, value in worst.items()))
    if options.json:
        options.json.write_text(json.dumps(worst | {"cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
