"""Peak memory of scoring a streamed 15B teacher, and the cost of the hooks.

    python benchmarks/speed/scoring.py [--quick] [--json FILE] [--layers N] [--tokens N] [--folder DIR]

Memory: the peak VmHWM from the provenance of the real command `score`, on a synthetic checkpoint of Nemotron-4 15B's shape
(31 GB of disk; --layers reduces it, --quick is 1 layer and 64 tokens). Hooks: layers of SmolLM2's shape with random weights
run forward with and without statistics, alternating on the same activations; the figure is the ratio of the shortest times.
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
from typing import Any

import torch
from prune_full_size import TEACHER, make_teacher
from safetensors.torch import save_file

from minitron_train.arch import architecture
from minitron_train.arch.shape import Shape
from minitron_train.config import ParallelConfig
from minitron_train.parallel.groups import start
from minitron_train.pruning.collect import Statistics, count_block
from minitron_train.pruning.layers import Layers, forward
from minitron_train.runtime.launch import World

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


@torch.no_grad()
def hook_overhead(rounds: int) -> dict[str, float]:
    """Seconds of the plain and of the watched forward pass, and their ratio minus one."""
    shortest = {"plain": float("inf"), "watched": float("inf")}
    with start(ParallelConfig(), World(), 1) as groups:
        layers = Layers(architecture("llama"), SMOLLM2, RandomSource(SMOLLM2), groups, resident=True)
        hidden, rotary = torch.randn(512, 8, 576), layers.rotary(512)
        for _ in range(rounds):
            for kind in shortest:
                statistics, start_s = Statistics(2), time.perf_counter()
                for i in range(2):
                    if kind == "plain":
                        forward(layers[i], hidden, rotary)
                        continue
                    with statistics.watching(layers[i], i, [None]):
                        count_block(statistics, i, hidden, forward(layers[i], hidden, rotary), None)
                shortest[kind] = min(shortest[kind], time.perf_counter() - start_s)
    return {**shortest, "overhead": shortest["watched"] / shortest["plain"] - 1}


def peak_memory(root: Path, num_layers: int, num_tokens: int) -> dict[str, Any]:
    """Provenance of the real command on a synthetic teacher."""
    source, tokens = root / "teacher", root / "tokens.safetensors"
    source.mkdir()
    make_teacher(source, replace(TEACHER, num_layers=num_layers))
    length = min(512, num_tokens)
    save_file({"tokens": torch.randint(0, TEACHER.vocab_size, (1, num_tokens // length, length))}, tokens)
    command = [sys.executable, "-W", "ignore", "-m", "minitron_train", "score", f"teacher.path={source}"]
    command += [f"calibration.tokens_path={tokens}", "calibration.streamed=true", f"output_dir={root / 'out'}"]
    subprocess.run(command, check=True)
    return json.loads((root / "out" / "scores" / "provenance.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="folder with enough disk space; default: a temporary folder")
    arguments = parser.parse_args()
    num_layers, num_tokens = (1, 64) if arguments.quick else (arguments.layers, arguments.tokens)
    hooks = hook_overhead(rounds=3 if arguments.quick else 15)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="scoring-", dir=arguments.folder))
    try:
        record = peak_memory(root, num_layers, num_tokens)
    finally:
        shutil.rmtree(root)
    report = {
        "peak_rss_gib": record["peak_rss_bytes"] / 2**30,
        "tokens": record["facts"]["tokens"],
        "layers": num_layers,
        "hook_overhead": hooks["overhead"],
        "wall_seconds": record["wall_seconds"],
        "tokens_per_second": record["facts"]["tokens"] / record["wall_seconds"],
        "cases": [hooks],
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
