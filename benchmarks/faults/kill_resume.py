"""Kill a training run with SIGKILL at random moments, resume it, and compare it with an uninterrupted run.

    python benchmarks/faults/kill_resume.py [--kills N] [--quick] [--json FILE]

Student and teacher have the shapes of recipe `tiny`. A checkpoint is written every fourth step, so that many kills hit a
save. A process that has imported everything forks one trainer per attempt, so an attempt needs no imports. `resumed`
counts the kills after which a run resumed from the newest finished checkpoint. `bit_equal` counts those after which every
logged loss and gradient norm equals the uninterrupted run's, bit for bit.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked process must not inherit a thread pool

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands.workspace import shape_of_recipe
from minitron_train.config import Config, ModelConfig, Precision, StudentConfig, TrainConfig, WandbMode
from minitron_train.parallel.groups import start
from minitron_train.runtime.launch import read_world
from minitron_train.train import checkpoint_files as files
from minitron_train.train.metrics import read_rows
from minitron_train.train.pretrain import write_initial
from minitron_train.train.run import train

ROOT = Path(__file__).parents[2]
NUM_STEPS, INTERVAL_STEPS = 40, 4
LATEST_KILL = 0.6  # as a fraction of an uninterrupted run's seconds
COMPARED = ("step", "tokens", "loss", "kd_loss", "grad_norm", "lr", "eval.validation.kl", "eval.validation.perplexity")
RESUMED = re.compile(r"resumed at step (\d+) of")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="10 kills, within a minute")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_resume-") as folder:
        result = measure(Path(folder), 10 if arguments.quick else arguments.kills, arguments.seed)
    summary = {key: value for key, value in result.items() if key != "cases"}
    print("\n".join(f"{key:28} {value}" for key, value in summary.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def tiny_config(folder: Path) -> tuple[Config, Shape, Shape]:
    """Recipe tiny's shapes, with short steps. The corpus is the standard library's json package."""
    from omegaconf import OmegaConf

    model: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / "tiny_nemotron.yaml"))
    recipe: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "recipes" / "tiny.yaml"))
    init_std = model.pop("init_std")
    teacher = shape_of_recipe(Config(model=ModelConfig(**model)))
    assert teacher is not None
    student = teacher.smaller(
        **{key: value for key, value in recipe["student"].items() if key in StudentConfig.__dataclass_fields__}
    )
    config = Config(name="kill_resume", output_dir=str(folder), model=ModelConfig(init_std=init_std))
    config.data.num_workers, config.data.validation_tokens = 0, 256
    config.data.path = str(Path(os.__file__).parent / "[a-d]*.py")
    rows, length = 2, 64
    config.train = TrainConfig(
        num_tokens=NUM_STEPS * rows * length,
        global_batch_size=rows,
        micro_batch_size=rows,
        seq_length=length,
        lr=1e-3,
        warmup_steps=5,
        precision=Precision.fp32,
    )
    config.eval.every_tokens = 10 * rows * length
    config.checkpoint.interval_steps = INTERVAL_STEPS
    config.tracking.wandb.mode = WandbMode.disabled
    return config, teacher, student


@dataclass
class Attempt:
    """One forked trainer: how it ended and what it did."""

    killed: bool
    seconds: float
    during_save: bool  # it left an unfinished checkpoint
    newest_before: int  # step of the newest finished checkpoint when it started, 0 without one
    resumed_at: int | None  # None: it was killed before it resumed
    new_rows: int  # lines that it added to metrics.jsonl
    equal: bool  # all lines equal the uninterrupted run's
    log: str = field(default="", repr=False)


def measure(folder: Path, num_kills: int, seed: int) -> dict[str, Any]:
    """Run attempts until `num_kills` of them were killed and the last run is complete."""
    config, teacher, student = tiny_config(folder)
    fork_and_wait(
        lambda: [write_initial(config, shape, made(folder / name)) for name, shape in (("t", teacher), ("s", student))]
    )

    def trainer(target: Path) -> None:
        with start(config.parallel, read_world(), config.seed) as groups:
            train(config, groups, student=folder / "s", teacher=folder / "t", folder=target)

    begin_s = time.monotonic()
    wanted = None
    for name in ("warm", "untouched"):
        begin_s = time.monotonic()
        fork_and_wait(lambda name=name: trainer(folder / name))
        whole_s = time.monotonic() - begin_s
        wanted = compared(folder / name)
    assert wanted is not None and len(wanted) == NUM_STEPS
    moments, run, attempts = random.Random(seed), folder / "run", []
    latest_s = LATEST_KILL * whole_s
    print(f"uninterrupted run: {whole_s:.1f} s; killing at random moments up to {latest_s:.1f} s", flush=True)
    while sum(attempt.killed for attempt in attempts) < num_kills or attempts[-1].killed:
        enough = sum(attempt.killed for attempt in attempts) >= num_kills
        attempts.append(attempt_once(trainer, run, wanted, None if enough else moments.uniform(0.05, latest_s)))
        if not attempts[-1].killed:  # this run is complete: the next attempt begins a new one
            shutil.rmtree(run)
    return summarise(attempts)


def attempt_once(trainer: Callable[[Path], None], run: Path, wanted: list[Any], delay_s: float | None) -> Attempt:
    """Fork a trainer, kill it after `delay_s` (None: let it finish), and read what it left behind."""
    newest = newest_step(run)
    log = run.with_suffix(".log")
    begin_s = time.monotonic()
    pid = fork(lambda: trainer(run), log)
    killed = delay_s is not None and not ended_within(pid, delay_s)
    if killed:
        os.kill(pid, signal.SIGKILL)
    status = 0 if (delay_s is not None and not killed) else os.waitpid(pid, 0)[1]
    text = log.read_text()
    assert killed or status == 0, text
    found = compared(run)
    resumed = RESUMED.search(text)
    started = resumed or "step 1/" in text
    at = int(resumed[1]) if resumed else (0 if started else None)
    return Attempt(
        killed=killed,
        seconds=time.monotonic() - begin_s,
        during_save=any((run / "checkpoints").glob("step_*.partial-*")),
        newest_before=newest,
        resumed_at=at,
        new_rows=0 if at is None else len(found) - at,
        equal=found == wanted[: len(found)],
        log=text,
    )


def summarise(attempts: list[Attempt]) -> dict[str, Any]:
    """Count a kill as resumed by the first later attempt that trains at least one step."""
    waiting = resumed = bit_equal = 0
    for attempt in attempts:
        if attempt.new_rows > 0 or not attempt.killed:
            good = attempt.resumed_at is None or attempt.resumed_at == attempt.newest_before
            resumed += waiting * good
            bit_equal += waiting * (good and attempt.equal)
            waiting = 0
        waiting += attempt.killed
    kept = {name: kind for name, kind in Attempt.__dataclass_fields__.items() if kind.repr}
    return {
        "kills": sum(attempt.killed for attempt in attempts),
        "resumed": resumed,
        "bit_equal": bit_equal,
        "kills_during_a_save": sum(attempt.killed and attempt.during_save for attempt in attempts),
        "kills_before_the_first_step": sum(attempt.killed and attempt.new_rows <= 0 for attempt in attempts),
        "whole_runs": sum(not attempt.killed for attempt in attempts),
        "cases": [{name: getattr(attempt, name) for name in kept} for attempt in attempts],
    }


def newest_step(run: Path) -> int:
    """Step of the newest finished checkpoint; 0 if none exists."""
    found = files.finished(run / "checkpoints")
    return int(found[0].name.removeprefix("step_")) if found else 0


def compared(run: Path) -> list[Any]:
    """The fields of each line that must be equal."""
    return [[row.get(key) for key in COMPARED] for row in read_rows(run / "metrics.jsonl").values]


def made(folder: Path) -> Path:
    """Make the folder and return it."""
    folder.mkdir(parents=True)
    return folder


def fork(work: Callable[[], Any], log: Path | None = None) -> int:
    """Run `work` in a forked process; its output goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
    os._exit(code)


def fork_and_wait(work: Callable[[], Any]) -> None:
    """Run `work` in a forked process to its end."""
    assert os.waitpid(fork(work), 0)[1] == 0


def ended_within(pid: int, delay_s: float) -> bool:
    """Whether the process exits successfully before `delay_s` passes."""
    end_s = time.monotonic() + delay_s
    while time.monotonic() < end_s:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


if __name__ == "__main__":
    main()
