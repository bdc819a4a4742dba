"""Kill every stage at its file operations, rerun it, and compare the output folder with an uninterrupted run's.

    python benchmarks/faults/kill_files.py [--every N | --sample N] [--stages NAME …] [--seed N] [--json FILE]

A file operation is an open for writing, a rename, link, deletion, fsync or new folder within the output folder. A stage
runs on recipe `micro`, in a process that is forked from one that has imported everything. An audit hook sends SIGKILL
right before the stage's n-th operation. Then the same command runs again without a kill. `equal` counts the kills after
which the folder has the same names and bytes as the uninterrupted run's, except for times and durations.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked process must not inherit a thread pool
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import minitron_train.commands.search
import minitron_train.evaluation.run  # so that no forked process imports them again
import minitron_train.pruning.prune
import minitron_train.reporting
import minitron_train.train.run  # noqa: F401
from minitron_train.commands import cli
from minitron_train.runtime.launch import World

MICRO = (
    *("+recipe=micro", "tracking.wandb.mode=disabled", "pretrain.num_tokens=2048", "train.num_tokens=4096"),
    *("train.warmup_steps=1", "train.global_batch_size=8", "checkpoint.interval_steps=2", "checkpoint.keep=1"),
    *("eval.every_tokens=1024", "data.validation_tokens=256"),
)
GRID = ("search.target=260000", "search.tolerance=0.5", "search.hidden_size=[64]", "search.ffn_expansion=[2]")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")  # audit events
VARYING = {  # keys whose values differ between two runs of the same work: times, and the command line
    *(
        "started_at",
        "wall_seconds",
        "peak_rss_bytes",
        "tokens_per_second",
        "data_seconds",
        "gemm_utilisation",
        "mfu",
        "peak_memory_bytes",
    ),
    *("command", "force", "resumed_at_step", ".metadata"),  # megatron-core writes a random id into .metadata
}
MANIFEST_HASH = re.compile(r"(step_\d+):[0-9a-f]{64}")  # in provenance.json; the manifest holds the hash of .metadata
UNLIKE = (".html", ".metadata", "plan.json")  # compared by existence only: drawn, or computed from measured speeds
STAGE_TIME = re.compile(r"(\| [\d.]+ \|$)|(^python -m minitron_train .*\n)", flags=re.MULTILINE)  # in README.md


@dataclass(frozen=True)
class Stage:
    """One command of the chain, and the arguments of the rerun where they differ."""

    words: tuple[str, ...]
    again: tuple[str, ...] = ()

    @property
    def rerun(self) -> tuple[str, ...]:
        """The command line after the kill."""
        return self.again or self.words


STAGES = {
    "pretrain": Stage(("pretrain",)),
    "score": Stage(("score",)),
    "prune": Stage(("prune",)),
    "prune again": Stage(("prune", "force=true"), again=("prune",)),
    "distill": Stage(("distill",)),
    "export": Stage(("export",)),
    "eval": Stage(("eval",)),
    "eval again": Stage(("eval", "force=true"), again=("eval",)),
    "report": Stage(("report",)),
    "plan": Stage(("plan",)),
    "search": Stage(("search", *GRID, "search.retrain_tokens=1024")),
}


@dataclass
class Outcome:
    """Result of all kills of one stage."""

    operations: int = 0
    killed: int = 0
    equal: int = 0
    differences: dict[int, list[str]] = field(default_factory=dict)  # n -> what differs after the rerun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="kill at every N-th operation of each stage")
    parser.add_argument("--sample", type=int, help="kill each stage at N random operations instead")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0, help="random seed of --sample")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chooser = random.Random(arguments.seed)

    def choose(num_operations: int) -> Sequence[int]:
        every = range(1, num_operations + 1)
        if arguments.sample is None:
            return every[:: arguments.every]
        return sorted(chooser.sample(every, min(arguments.sample, num_operations)))

    with tempfile.TemporaryDirectory(prefix="kill_files-") as folder:
        outcomes = sweep(Path(folder).resolve(), arguments.stages, choose)
    for name, outcome in outcomes.items():
        print(f"{name:12} {outcome.operations:5} operations {outcome.killed:5} kills {outcome.equal:5} equal")
        for n, lines in outcome.differences.items():
            print(f"    operation {n}: {'; '.join(lines)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({name: vars(outcome) for name, outcome in outcomes.items()}, indent=1))
    sys.exit(any(outcome.equal < outcome.killed for outcome in outcomes.values()))


def sweep(folder: Path, names: Sequence[str], choose: Callable[[int], Sequence[int]]) -> dict[str, Outcome]:
    """Run all stages in order. `choose` maps the number of a stage's operations to those before which it is killed."""
    out, before, outcomes = folder / "out", folder / "before", {}
    last = max(list(STAGES).index(name) for name in names)
    for name, stage in list(STAGES.items())[: last + 1]:
        replace(before, out)
        num_operations = run(stage.words, out)[1]
        if name in names:
            outcomes[name] = kill(stage, folder, num_operations, choose(num_operations))
        replace(folder / "kept", out)
    return outcomes


def kill(stage: Stage, folder: Path, num_operations: int, places: Sequence[int]) -> Outcome:
    """Kill one stage before the given operations. `folder`/out holds its uninterrupted result, before/ its input."""
    out, outcome = folder / "out", Outcome(operations=num_operations)
    replace(folder / "untouched", out)
    wanted = contents(out)
    for n in places:
        replace(out, folder / "before")
        died, _ = run(stage.words, out, kill_at=n)
        run(stage.rerun, out)
        found = contents(out)
        lines = [
            f"{path} {'is left over' if path not in wanted else 'is missing' if path not in found else 'differs'}"
            for path in sorted({*wanted, *found})
            if wanted.get(path) != found.get(path)
        ]
        outcome.killed += died
        outcome.equal += died and not lines
        if died and lines:
            outcome.differences[n] = lines
    replace(out, folder / "untouched")
    return outcome


def replace(target: Path, source: Path) -> None:
    """Make `target` a copy of `source`; remove it if `source` does not exist."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target, symlinks=True)


def run(words: Sequence[str], out: Path, kill_at: int = 0) -> tuple[bool, int]:
    """Run one command in a forked process.

    Returns:
        Whether it was killed before operation `kill_at` (0: never), and the number of its operations.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        run_here(words, out, kill_at, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        num_operations = len(pipe.read())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(words)}: exit code {code}\n{(out.parent / 'log').read_text()[-2000:]}")
    return code == -signal.SIGKILL, num_operations


def run_here(words: Sequence[str], out: Path, kill_at: int, pipe: int) -> None:
    """In the forked process: run a command, write one byte into `pipe` per operation, never return."""
    log = os.open(out.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = 0

    def operation() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(pipe, b".")

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(details[2], int) and details[2] & WRITING):
            relative = event in ("os.remove", "os.rmdir", "os.mkdir") and details[-1] not in (
                -1,
                None,
            )  # to a descriptor
            if relative or (isinstance(details[0], str | os.PathLike) and inside(os.fspath(details[0]), out)):
                operation()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        operation()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    try:
        cli.run(["minitron_train", words[0], *MICRO, f"output_dir={out}", *words[1:]], World())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def inside(path: str, folder: Path) -> bool:
    """Whether a path is the folder, lies in it, or is its scratch file or lock."""
    return str(Path(path).absolute()).startswith((str(folder), str(folder.parent / f".{folder.name}")))


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> digest without times; folders are included."""
    return {
        str(path.relative_to(folder)): digest(path) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def digest(path: Path) -> str:
    """Digest of one file's content without what differs between two runs of the same work."""
    if path.name.endswith(UNLIKE):
        return "exists"
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = [data] if path.suffix == ".json" else data.splitlines()
        data = repr([lasting(json.loads(line)) for line in lines]).encode()
    elif path.suffix == ".md":
        data = STAGE_TIME.sub("", data.decode()).encode()
    return hashlib.sha256(data).hexdigest()


def lasting(value: Any) -> Any:
    """A JSON value without the keys of VARYING, at any depth."""
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in VARYING}
    if isinstance(value, list):
        return [lasting(item) for item in value]
    return MANIFEST_HASH.sub(r"\1", value) if isinstance(value, str) else value


if __name__ == "__main__":
    main()
