"""Peak memory of scoring a streamed 15B teacher, speed in fp32 and bf16, and the cost of the hooks.

    python benchmarks/speed/scoring.py [--quick] [--json FILE] [--layers N] [--tokens N] [--folder DIR]
        [--baseline CHECKOUT] [--model FOLDER]

Memory: the peak VmHWM from the provenance of the real command `score`, on a synthetic checkpoint of Nemotron-4 15B's shape
(31 GB of disk; --layers reduces it, 0 leaves it out, --quick is 1 layer and 64 tokens). Hooks: layers of SmolLM2's shape with
random weights run forward with and without statistics, in fp32 and bf16. The four take turns, so that other load affects all.
The overhead is the median over the rounds of watched by plain CPU seconds, minus 1. Baseline: the command `score` of
another checkout in fp32 and of this one in fp32 and bf16, in turn, on SmolLM2 (--model) and 4,096 tokens.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkouts import against_baseline
from prune_full_size import TEACHER, make_teacher
from safetensors.torch import save_file

from minitron_train.arch import architecture
from minitron_train.arch.shape import Shape
from minitron_train.config import ParallelConfig
from minitron_train.parallel.groups import start
from minitron_train.pruning.collect import Statistics, count_block
from minitron_train.pruning.layers import Layers, forward
from minitron_train.runtime.launch import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMOLLM2 = Shape(
    architecture="llama",
    num_layers=2,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=512,
    tie_embeddings=True,
)


class RandomSource:
    """A weight source that draws random tensors of a shape."""

    def __init__(self, shape: Shape) -> None:
        self.sizes = architecture(shape.architecture).tensors(shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A fresh random tensor."""
        tensor = torch.randn(self.sizes[name]) * 0.05
        return tensor if dim is None else tensor.narrow(dim, start, (stop or tensor.shape[dim]) - start)

    def rows(self, name: str, index_N: torch.Tensor) -> torch.Tensor:
        """Rows of one."""
        return self.read(name)[index_N]


def watched_pass(layers: Layers, hidden: torch.Tensor, rotary: torch.Tensor) -> None:
    """One forward pass of all layers on the same input, with statistics."""
    statistics = Statistics(SMOLLM2.num_layers)
    for i in range(SMOLLM2.num_layers):
        with statistics.watching(layers[i], i, [None]):
            count_block(statistics, i, hidden, forward(layers[i], hidden, rotary), None)


def plain_pass(layers: Layers, hidden: torch.Tensor, rotary: torch.Tensor) -> None:
    """The same without statistics."""
    for i in range(SMOLLM2.num_layers):
        forward(layers[i], hidden, rotary)


@torch.no_grad()
def hook_overhead(rounds: int) -> dict[str, Any]:
    """Cost of the hooks in each precision, tokens/s of one layer with them, and `speedup_vs_fp32` of bf16."""
    seconds: dict[tuple[str, Any], list[float]] = {
        (precision, run): [] for precision in DTYPES for run in (plain_pass, watched_pass)
    }
    with start(ParallelConfig(), World(), 1) as groups:
        models = {
            precision: Layers(architecture("llama"), SMOLLM2, RandomSource(SMOLLM2), groups, resident=True, dtype=dtype)
            for precision, dtype in DTYPES.items()
        }
        hidden_SBH, rotary = torch.randn(512, 8, 576), models["fp32"].rotary(512)
        inputs = {precision: hidden_SBH.to(dtype) for precision, dtype in DTYPES.items()}
        for _ in range(1 + rounds):
            for (precision, run), taken in seconds.items():
                start_s = time.process_time()
                run(models[precision], inputs[precision], rotary)
                taken.append(time.process_time() - start_s)
    seconds = {key: taken[1:] for key, taken in seconds.items()}  # the first round warms up
    cases = []
    for precision in DTYPES:
        plain, watched = seconds[precision, plain_pass], seconds[precision, watched_pass]
        case: dict[str, Any] = {"precision": precision, "plain_s": median(plain), "watched_s": median(watched)}
        case["hook_overhead"] = median_ratio(watched, plain) - 1
        case["layer_tokens_per_second"] = SMOLLM2.num_layers * hidden_SBH[..., 0].numel() / median(watched)
        cases.append(case)
    speedup = median_ratio(seconds["fp32", watched_pass], seconds["bf16", watched_pass])
    shares = {f"hook_overhead_{case['precision']}": case["hook_overhead"] for case in cases}
    return {**shares, "speedup_vs_fp32": speedup, "threads": torch.get_num_threads(), "cases": cases}


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of the ratio."""
    return median(a / b for a, b in zip(above, below, strict=True))


def speed_of_checkouts(baseline: Path, model: Path, rounds: int) -> dict[str, Any]:
    """The command `score` here and in the checkout `baseline`."""
    command = ["score", "+recipe=smollm2", f"teacher.path={model.resolve()}", "calibration.num_samples=16"]
    return against_baseline(baseline, command, "calibration.precision", "scores/provenance.json", rounds)


def peak_memory(root: Path, num_layers: int, num_tokens: int) -> dict[str, Any]:
    """Memory and time of the real command on a synthetic teacher."""
    source, tokens = root / "teacher", root / "tokens.safetensors"
    source.mkdir()
    make_teacher(source, replace(TEACHER, num_layers=num_layers))
    length = min(512, num_tokens)
    save_file({"tokens": torch.randint(0, TEACHER.vocab_size, (1, num_tokens // length, length))}, tokens)
    command = [sys.executable, "-W", "ignore", "-m", "minitron_train", "score", f"teacher.path={source}"]
    command += [f"calibration.tokens_path={tokens}", "calibration.streamed=true", f"output_dir={root / 'out'}"]
    subprocess.run(command, check=True)
    record = json.loads((root / "out" / "scores" / "provenance.json").read_text())
    num_tokens, wall_s = record["facts"]["tokens"], record["wall_seconds"]
    figures = {"layers": num_layers, "tokens": num_tokens, "peak_rss_gib": record["peak_rss_bytes"] / 2**30}
    return {**figures, "wall_seconds": wall_s, "tokens_per_second": num_tokens / wall_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="folder with enough disk space; default: a temporary folder")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="another checkout, timed in fp32")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2/teacher"), help="teacher for --baseline")
    arguments = parser.parse_args()
    num_layers, num_tokens = (1, 64) if arguments.quick else (arguments.layers, arguments.tokens)
    report = hook_overhead(rounds=3 if arguments.quick else 15)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="scoring-", dir=arguments.folder))
    try:
        if arguments.baseline:
            report |= speed_of_checkouts(arguments.baseline, arguments.model, 1 if arguments.quick else 5)
        if num_layers:
            report |= peak_memory(root, num_layers, num_tokens)
    finally:
        shutil.rmtree(root)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
