"""Scoring and slicing at full size: Nemotron-4 15B to Minitron-4B, 31.3 GB to 8.4 GB in bf16, compared with a plain copy.

    python benchmarks/speed/prune_full_size.py [--quick] [--layers N] [--folder DIR] [--json FILE]

Makes a synthetic checkpoint of the 15B shape (about 45 GB of disk with the result; --layers reduces it, --quick is
--layers 1) and runs the real command `prune +recipe=4b` on it with 16 calibration tokens. Each stage's seconds and peak
memory (VmHWM, with mapped pages) come from its provenance. Sampled tensors are compared with direct slicing.
The peer is a plain loop that reads the same bytes as slicing and writes as many. The files are dropped from the page
cache before each side. Both sides end with fsync.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron_train import hf
from minitron_train.arch import architecture
from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.arch.shape import Shape
from minitron_train.pruning.select import Keep
from minitron_train.pruning.shards import RowReader, RowWriter, runs
from minitron_train.pruning.slice import blocks, origins

TEACHER = Shape(
    architecture="nemotron",
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=256000,
    kinds=(LayerKind(rope=Rope(percent=0.5)),),
)
STUDENT = {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24}
PERIOD = 2**25 + 1  # the weights repeat after this many values; odd, so that no two rows of a tensor are equal
SAMPLE = ("model.embed_tokens.weight", "q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "input_layernorm.weight")


def make_teacher(folder: Path, shape: Shape) -> None:
    """A checkpoint of `shape` in shards, filled by repeating a long row of random bf16 numbers."""
    table = architecture("nemotron")
    tensors = {name: ("BF16", size) for name, size in table.tensors(shape).items()}
    numbers = (torch.randn(PERIOD) * 0.02).bfloat16().view(torch.int16).numpy()
    twice = np.concatenate([numbers, numbers])
    with RowWriter(folder, tensors) as writer:
        place = 0
        for name, (_, size) in tensors.items():
            height, width = (*size, 1)[:2]
            step = max(1, PERIOD // width)
            for first in range(0, height, step):
                count = min(step, height - first) * width
                writer.write(name, first, twice[place : place + count])
                place = (place + count) % PERIOD
    config = {
        "model_type": "nemotron",
        "architectures": ["NemotronForCausalLM"],
        "hidden_act": "relu2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "dtype": "bfloat16",
        **{key: getattr(shape, name) for name, key in table.config_keys.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))


def drop_from_cache(*folders: Path) -> None:
    """Drop the files of these folders from the page cache, so that the next read comes from the disk."""
    for file in (file for folder in folders for file in folder.rglob("*.safetensors")):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run_command(teacher: Path, output: Path, tokens: Path, layers: int) -> dict[str, dict[str, Any]]:
    """Run the real command; return the provenance of both stages."""
    command = [sys.executable, "-W", "ignore", "-m", "minitron_train", "prune", "+recipe=4b", f"teacher.path={teacher}"]
    command += ["calibration.num_samples=1", "calibration.seq_length=16", f"calibration.tokens_path={tokens}"]
    command += [f"output_dir={output}", f"model.num_layers={layers}"]
    subprocess.run(command, check=True)
    stages = {"score": "scores", "prune": "pruned"}
    return {stage: json.loads((output / folder / "provenance.json").read_text()) for stage, folder in stages.items()}


def kept(folder: Path, teacher: Shape, student: Shape) -> Keep:
    """Read the kept indices that the command wrote."""
    tensors = load_file(folder / "kept.safetensors")
    layers = tensors["layers"].tolist()
    by_layer: dict[str, Any] = {
        kind: {i: tensors[f"layers.{i}.{kind}"] for i in layers} for kind in ("heads", "groups", "ffn")
    }
    return Keep(teacher, student, tensors["embedding"], tensors["layers"], **by_layer, partners={})


def plain_copy(teacher: hf.HFFolder, keep: Keep, target: Path) -> tuple[int, int, float]:
    """Bytes read, bytes written and seconds of a plain loop over the same reads and as many written bytes."""
    reader, buffer, num_read, num_written = RowReader(teacher), bytearray(64 * 2**20), 0, 0
    start_s = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for block in blocks(teacher, keep, origins(teacher, keep)):
            entry, row_bytes = teacher.stored[block.origin.name], reader.row_bytes(block.origin.name)
            for first, last in runs(block.rows):
                view = memoryview(buffer)[: (last - first) * row_bytes]
                num_read += os.preadv(
                    reader.files[entry.file], [view], entry.start + int(block.rows[first]) * row_bytes
                )
            columns = row_bytes // 2 if block.columns is None else len(block.columns)
            num_written += out.write(memoryview(buffer)[: len(block.rows) * columns * 2])
        os.fsync(out.fileno())
    return num_read, num_written, time.perf_counter() - start_s


def sampled(names: list[str], num_layers: int) -> Iterator[str]:
    """Names of the tensors to compare: every kind, in the first and the last layer."""
    for name in names:
        layers = [int(part) for part in name.split(".") if part.isdigit()]
        if any(kind in name for kind in SAMPLE) and set(layers) <= {0, num_layers - 1}:
            yield name


def verify(teacher: hf.HFFolder, keep: Keep, folder: Path) -> int:
    """Compare sampled tensors with direct slicing of the teacher's; return how many were compared."""
    written, found = hf.HFFolder(folder), origins(teacher, keep)
    names = list(sampled(list(found), keep.student.num_layers))
    for name in names:
        origin = found[name]
        with safe_open(str(teacher.files[origin.name]), framework="pt") as file:
            wanted = file.get_tensor(origin.name)
            for dim, axis in enumerate(origin.axes):
                rows = keep.rows(axis, origin.layer)
                wanted = wanted if rows is None else wanted.index_select(dim, rows)
            assert torch.equal(written.read(name), wanted), name
    return len(names)


def disk_speed(folder: Path) -> tuple[float, float]:
    """GB/s of a sequential write and read of 2 GiB, to and from the disk."""
    file, block = folder / "speed.safetensors", os.urandom(2**24)
    start_s = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        for _ in range(128):
            out.write(block)
        os.fsync(out.fileno())
    written_s = time.perf_counter() - start_s
    drop_from_cache(folder)
    start_s = time.perf_counter()
    with file.open("rb", buffering=0) as source:
        while source.read(2**24):
            pass
    read_s = time.perf_counter() - start_s
    file.unlink()
    return 2.147 / written_s, 2.147 / read_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="folder with enough disk space; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    num_layers = 1 if arguments.quick else arguments.layers
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="prune_full_size-", dir=arguments.folder))
    try:
        report = measure(root, num_layers)
    finally:
        shutil.rmtree(root)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(root: Path, num_layers: int) -> dict[str, Any]:
    """Measure all figures in a scratch folder."""
    source, output, tokens = root / "teacher", root / "out", root / "tokens.safetensors"
    source.mkdir()
    write_speed, read_speed = disk_speed(root)
    make_teacher(source, replace(TEACHER, num_layers=num_layers))
    save_file({"tokens": torch.randint(0, TEACHER.vocab_size, (1, 1, 16))}, tokens)
    teacher = hf.HFFolder(source)
    drop_from_cache(source)
    stages = run_command(source, output, tokens, num_layers)
    # slicing alone, with a cold cache: the command above has just read the whole teacher for the scores
    drop_from_cache(source)
    shutil.rmtree(output / "pruned")
    stages["prune"] = run_command(source, output, tokens, num_layers)["prune"]
    keep = kept(output / "pruned", teacher.shape, teacher.shape.smaller(**STUDENT))
    num_checked = verify(teacher, keep, output / "pruned")
    drop_from_cache(source, output)
    num_read, num_written, plain_s = plain_copy(teacher, keep, root / "plain.bin")
    cases = {
        stage: {"wall_seconds": record["wall_seconds"], "peak_rss_gib": record["peak_rss_bytes"] / 2**30}
        for stage, record in stages.items()
    }
    return {
        "layers": num_layers,
        "peak_rss_gib": cases["prune"]["peak_rss_gib"],
        "score_peak_rss_gib": cases["score"]["peak_rss_gib"],
        "wall_seconds": cases["prune"]["wall_seconds"],
        "plain_seconds": plain_s,
        "wall_ratio": cases["prune"]["wall_seconds"] / plain_s,
        "gb_read": num_read / 1e9,
        "gb_written": num_written / 1e9,
        "disk_write_gb_per_s": write_speed,
        "disk_read_gb_per_s": read_speed,
        "tensors_verified": num_checked,
        "parameters": stages["prune"]["facts"]["parameters"],
        "cases": cases,
    }


if __name__ == "__main__":
    main()
