"""Memory, time and exactness of one forward and backward pass of the distillation loss, compared with other libraries.

    python benchmarks/speed/kd_loss.py [--quick] [--json FILE] [--peers DIR]

Every implementation starts from hidden states and output weights, so each peer's `linear` is included. One U is a
[tokens, vocabulary] tensor in fp32.

    peak      highest resident memory of the process during the first pass (VmHWM, reset through /proc/self/clear_refs),
              minus the memory before it and the gradients of hidden states and output weights
    seconds   median over the later passes of several fresh processes, with the implementations alternating. The ratio of
              the best passes is printed too, for machines with other load
    error     relative Frobenius norm against float64 gradients, the larger of hidden states and output weights; logits have
              a standard deviation of 3

The peers are installed once into DIR, without their dependencies (torch is shared).
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

PEER_PACKAGES = ["nvidia-modelopt==0.47.0", "torchtune==0.6.1", "liger-kernel==0.8.5", "pulp==2.9.0"]
PEERS = ["modelopt", "torchtune", "liger", "naive"]
MEMORY_FRACTIONS = [0.0, 0.05, 0.1, 0.2, 0.4, 0.8]
BLOCKS = [{"vocab_tile": tile} for tile in (512, 2048, 8192, 32768)]
BLOCKS += [{"token_chunk": chunk, "vocab_tile": 1 << 20} for chunk in (16, 32, 64)]
BLOCKS += [{"token_chunk": chunk} for chunk in (64, 128, 256)]
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one problem."""

    tokens: int
    vocab: int
    student_hidden: int
    teacher_hidden: int

    @property
    def bytes_needed(self) -> int:
        """Memory of the naive implementation in fp32: inputs, gradients, six logit tensors."""
        weights = self.vocab * (2 * self.student_hidden + self.teacher_hidden)
        return 4 * (weights + 7 * self.tokens * self.vocab)


FULL, QUICK = Sizes(512, 256_000, 512, 512), Sizes(128, 32_000, 128, 128)
WIDE = [Sizes(512, 64_000, 3072, 6144), Sizes(2048, 64_000, 3072, 6144)]  # a shard of TP 4


@dataclass(slots=True)
class Row:
    """One line of the table; `seconds` holds all timed passes."""

    name: str
    tokens: int
    vocab: int
    student_hidden: int
    teacher_hidden: int
    tp: int = 1
    chunking: dict[str, Any] | None = None
    peak_u: float = 0.0
    seconds: list[float] = field(default_factory=list)
    grad_error: float | None = None

    @property
    def median_s(self) -> float:
        return median(self.seconds) if self.seconds else math.nan


@dataclass(frozen=True, slots=True)
class Bench:
    """Starts the worker processes."""

    peers: Path

    def run(self, row: Row, repeats: int, reference: Path | None = None, implementation: str | None = None) -> None:
        """Start one fresh process per rank and add its measurements to the row."""
        task = {
            "implementation": implementation or row.name,
            "tokens": row.tokens,
            "vocab": row.vocab,
            "student_hidden": row.student_hidden,
            "teacher_hidden": row.teacher_hidden,
            "repeats": repeats,
            "chunking": row.chunking,
            "peers": str(self.peers),
            "reference": str(reference or ""),
        }
        print(f"  {row.name} tp={row.tp} {row.chunking or ''}", file=sys.stderr, flush=True)
        results = self.launch(task, row.tp)
        if task["implementation"] == "reference":
            return
        row.peak_u = max([row.peak_u] + [result["peak_u"] for result in results])
        row.seconds += [max(times) for times in zip(*(result["seconds"] for result in results), strict=True)]
        if reference is not None:
            hidden = results[0]["hidden"] / results[0]["hidden_exact"]
            weight = sum(result["weight"] for result in results) / sum(result["weight_exact"] for result in results)
            row.grad_error = math.sqrt(max(hidden, weight))

    def launch(self, task: dict[str, Any], tp: int) -> list[dict[str, Any]]:
        """Return the ranks' answers. One rank uses all cores; several ranks share them."""
        worker = Path(__file__).with_name("kd_loss_worker.py")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = max(1, len(os.sched_getaffinity(0)) // tp)
        shared = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        shared["PYTHONPATH"] = os.pathsep.join(filter(None, [str(worker.parents[1]), shared.get("PYTHONPATH")]))
        ranks = []
        for rank in range(tp):
            world = {"RANK": rank, "WORLD_SIZE": tp, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": tp, "MASTER_PORT": port}
            env = shared | {key: str(value) for key, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, str(worker), json.dumps(task)]
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        answers = []
        for process in ranks:
            out, errors = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                raise SystemExit(f"{task['implementation']} failed:\n{errors[-3000:]}")
            answers.append(json.loads(out.strip().splitlines()[-1]))
        return answers


def install_peers(folder: Path) -> None:
    """Install the pinned code of the peers. A marker file shows a finished installation."""
    marker = folder / "installed.txt"
    wanted = "\n".join(PEER_PACKAGES)
    if marker.exists() and marker.read_text() == wanted:
        return
    print(f"installing {', '.join(PEER_PACKAGES)} into {folder}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*command, *PEER_PACKAGES], check=True)
    marker.write_text(wanted)


def compare(bench: Bench, sizes: Sizes, rounds: int, reference: Path, peers_split: list[int]) -> list[Row]:
    """Measure ours and every peer in turns, then split over ranks: ours at TP 2 and 4, ModelOpt's at `peers_split`."""
    rows = [Row(name, **asdict(sizes)) for name in ["ours", *PEERS]]
    bench.run(Row("reference", **asdict(sizes)), 0, reference, "reference")
    for turn in range(rounds):
        for row in rows:
            bench.run(row, 3, reference if turn == 0 else None)
    split = [Row("ours", **asdict(sizes), tp=tp) for tp in (2, 4)]
    split += [Row("modelopt", **asdict(sizes), tp=tp) for tp in peers_split]
    for row in split:
        bench.run(row, 1, reference)
    rows += split
    return rows


def curves(bench: Bench) -> list[Row]:
    """Measure ours over memory budgets and block shapes, and at the width of the paper's models."""
    rows = [Row("ours", **asdict(FULL), chunking={"logit_memory_fraction": budget}) for budget in MEMORY_FRACTIONS]
    rows += [Row("ours", **asdict(FULL), chunking=block) for block in BLOCKS]
    for row in rows:
        bench.run(row, 2)
    for sizes in WIDE:
        if psutil.virtual_memory().available < sizes.bytes_needed:
            print(f"  skipped, not enough memory: {sizes}", file=sys.stderr)
            continue
        wide = [Row("ours", **asdict(sizes), chunking={"logit_memory_fraction": budget}) for budget in (0.0, 0.2, 0.8)]
        wide.append(Row("naive", **asdict(sizes)))
        for row in wide:
            bench.run(row, 2)
        rows += wide
    return rows


def summary(rows: list[Row]) -> dict[str, Any]:
    """The figures by name: ours at the default budget against the best peer of each."""
    ours, *peers = [row for row in rows if row.tp == 1][: 1 + len(PEERS)]
    fastest = min(peers, key=lambda row: row.median_s)
    naive = next(row for row in peers if row.name == "naive")
    errors = {f"grad_error_tp{row.tp}": row.grad_error for row in rows if row.name == "ours" and row.grad_error}
    return {
        "ours_peak_u": ours.peak_u,
        "best_peer_peak_u": min(row.peak_u for row in peers),
        "ours_s": ours.median_s,
        "fastest_peer": fastest.name,
        "fastest_peer_s": fastest.median_s,
        "time_ratio": ours.median_s / fastest.median_s,
        "time_ratio_best_passes": min(ours.seconds) / min(min(row.seconds) for row in peers),
        **errors,
        "plain_grad_error": naive.grad_error,
    }


def show(rows: list[Row]) -> None:
    print(
        f"{'':10} {'tokens':>6} {'vocab':>7} {'hidden':>11} {'tp':>3} {'peak U':>7} {'seconds':>8} {'error':>8}  blocks"
    )
    for row in rows:
        error = "" if row.grad_error is None else f"{row.grad_error:.1e}"
        hidden = f"{row.student_hidden}/{row.teacher_hidden}"
        blocks = " ".join(f"{key}={value}" for key, value in (row.chunking or {}).items())
        print(
            f"{row.name:10} {row.tokens:6} {row.vocab:7} {hidden:>11} {row.tp:3} {row.peak_u:7.3f} "
            f"{row.median_s:8.2f} {error:>8}  {blocks}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small problem, one turn, no curves, within a minute")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache/minitron_train/peers", help="peers' code")
    args = parser.parse_args()
    install_peers(args.peers)
    bench, sizes = Bench(args.peers), QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.pt"
        rows = compare(bench, sizes, 1 if args.quick else 3, reference, [] if args.quick else [2])
    figures = summary(rows)
    if not args.quick:
        rows += curves(bench)
    show(rows)
    for key, value in figures.items():
        print(f"{key} = {value:.3g}" if isinstance(value, float) else f"{key} = {value}")
    if args.json:
        cases = [asdict(row) | {"median_s": row.median_s} for row in rows]
        args.json.write_text(json.dumps(figures | {"cases": cases}, indent=1))


if __name__ == "__main__":
    main()
