"""Speed of the training stream compared with a trainer's consumption, and the cost of resuming compared with `datasets`.

    python benchmarks/speed/stream.py [--quick] [--json FILE]

Throughput: packed tokens per second of each kind of source, from the second batch on, by number of tokenising processes.
`datasets` streams the same JSONL.gz and tokenises it in batches, without packing. The trainer is the fastest possible one
on this machine: it computes only the matrix products of a 28 M student's forward and backward pass and a 57 M teacher's
forward pass, at the rate of the fastest large GEMM on all cores (benchmarks/speed/step.py measures the real one).
Resume: seconds from a saved state to the next batch, after a fraction of one large JSONL.gz.
Stall: seconds that each step waits for a global batch of 4.7 M tokens of JSONL, tokenised by one process, with 12 s of
compute between two calls, with and without prefetching. Compute is matrix products on one thread until that thread has
used 12 s of CPU time. So other load on the machine delays the step and the stream alike. `producer_to_compute` is the
tokenising process's CPU time for one batch over those 12 s: the step waits if it exceeds 1. --quick divides tokens and
compute by 8.
"""

from step import SEQ_LENGTH, STUDENT, TEACHER, VOCAB, gemm_gflops  # isort: skip  # imported first, because it sets the number of threads

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from minitron_train.config import DataConfig
from minitron_train.data import corpus, tokenizers
from minitron_train.data.prefetch import PrefetchingStream
from minitron_train.data.stream import TokenStream
from minitron_train.planning.counts import forward_flops_per_token, training_flops_per_token

BATCH = 32
SHARES = (0.01, 0.5, 0.9)  # fractions of the file after which a run is resumed
STEP_ROWS, STEP_LENGTH, COMPUTE_S, NUM_STEPS = 1152, 4096, 12.0, 4  # NUM_STEPS: steps whose wait is measured


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    name: str
    num_workers: int
    tokens_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files, within a minute")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        documents = [
            text for path in corpus.modules() for part in corpus.PARTS for text in corpus.documents(path, part)
        ]
        tokenizers.save(tokenizers.train_bpe(documents[::4], VOCAB), folder / "tokenizer", max_length=1 << 20)
        tokenizer = tokenizers.load(folder / "tokenizer")
        trainer = trainer_tokens_per_second()
        rows = throughput(folder, documents, tokenizer, budget_s=1.5 if arguments.quick else 8.0)
        resume = resume_seconds(folder, documents * (2 if arguments.quick else 20), tokenizer)
        stalls = stall_seconds(folder, tokenizer, scale=8 if arguments.quick else 1)
    figures = summarise(rows, resume, trainer) | stalls
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def trainer_tokens_per_second() -> float:
    """Tokens per second if only the matrix products of benchmarks/speed/step.py took time, on all cores, best of ten."""
    flops = training_flops_per_token(STUDENT, SEQ_LENGTH) + forward_flops_per_token(TEACHER, SEQ_LENGTH)
    return max(gemm_gflops() for _ in range(10)) * 1e9 / flops


def throughput(folder: Path, documents: list[str], tokenizer: Any, budget_s: float) -> list[Row]:
    """Tokens per second of each kind of source."""
    rows = []
    for name, write in WRITERS.items():
        path = write(folder, documents, tokenizer)
        for num_workers in (0, 1, 2) if name != "bin" else (0,):
            data = DataConfig(path=str(path), num_workers=num_workers, cache_dir=str(folder / "cache"))
            stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
            batches = (stream.next_batch(BATCH).tokens_BS.numel() for _ in iter(int, 1))
            rows.append(Row(name, num_workers, rate(batches, budget_s)))
            stream.close()
    rows.append(Row("datasets, JSONL.gz", 0, rate(datasets_tokens(folder / "a.jsonl.gz", tokenizer), budget_s)))
    return rows


def rate(counts: Iterator[int], budget_s: float) -> float:
    """Tokens per second after the first count."""
    next(counts)
    total, start_s = 0, time.perf_counter()
    while time.perf_counter() - start_s < budget_s:
        total += next(counts)
    return total / (time.perf_counter() - start_s)


def datasets_tokens(path: Path, tokenizer: Any) -> Iterator[int]:
    """Tokens of each batch of documents, tokenised in this process, endlessly."""
    while True:
        for batch in open_datasets(path).iter(batch_size=32):
            yield sum(len(ids) for ids in tokenizer(batch["text"])["input_ids"])


def open_datasets(path: Path) -> Any:
    """The file as a stream of `datasets`."""
    import datasets

    return datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)


def write_jsonl(folder: Path, documents: list[str], tokenizer: Any) -> Path:
    path = folder / "a.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents))
    return path


def write_gzip(folder: Path, documents: list[str], tokenizer: Any) -> Path:
    path = folder / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.writelines(json.dumps({"text": text}).encode() + b"\n" for text in documents)
    return path


def write_parquet(folder: Path, documents: list[str], tokenizer: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "a.parquet", row_group_size=100)
    return folder / "a.parquet"


def write_text(folder: Path, documents: list[str], tokenizer: Any) -> Path:
    (folder / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return folder / "a.txt"


def write_indexed(folder: Path, documents: list[str], tokenizer: Any) -> Path:
    builder = IndexedDatasetBuilder(str(folder / "a.bin"), dtype=np.int32)
    for ids in tokenizer(documents)["input_ids"]:
        builder.add_document(np.array([*ids, tokenizer.eos_token_id]), [len(ids) + 1])  # type: ignore[arg-type]
    builder.finalize(str(folder / "a.idx"))
    return folder / "a.idx"


WRITERS: dict[str, Callable[[Path, list[str], Any], Path]] = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_gzip,
    "parquet": write_parquet,
    "text": write_text,
    "bin": write_indexed,
}


def resume_seconds(folder: Path, documents: list[str], tokenizer: Any) -> dict[str, Any]:
    """Seconds from a state to the next batch, after each fraction of one JSONL.gz: ours, and `datasets` with its own state."""
    path = write_gzip(folder, documents, tokenizer)
    data = DataConfig(path=str(path), num_workers=0, cache_dir=str(folder / "cache"))
    start_s = time.perf_counter()
    TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).next_batch(1)
    found: dict[str, Any] = {
        "file_megabytes": path.stat().st_size / 1e6,
        "copy_once_s": time.perf_counter() - start_s,
        "ours_s": [],
        "datasets_s": [],
    }
    num_documents = len(documents)
    for share in SHARES:
        stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
        packer = stream.packers[0]
        units = sum(1 for _ in stream.feed.epoch(0, (1, 0), {"epoch": 0, "unit": 0}))
        packer.position = {"epoch": 0, "unit": int(share * units)}
        state = stream.state_dict()
        found["state_bytes"] = len(json.dumps(state))
        found["ours_s"].append(seconds(lambda s=state: resume_ours(data, tokenizer, s)))
        rows = open_datasets(path)
        for _ in islice(rows, int(share * num_documents)):
            pass
        peer_state = rows.state_dict()
        found["datasets_s"].append(seconds(lambda s=peer_state: resume_datasets(path, s)))
    return found


def resume_ours(data: DataConfig, tokenizer: Any, state: dict) -> None:
    """Open a new stream, load the state, read the next batch."""
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
    stream.load_state_dict(state)
    stream.next_batch(1)


def resume_datasets(path: Path, state: dict) -> None:
    """Open a new stream of `datasets`, load the state, read the next document."""
    rows = open_datasets(path)
    rows.load_state_dict(state)
    next(iter(rows))


def seconds(work: Callable[[], None]) -> float:
    """Median of three runs."""
    times = []
    for _ in range(3):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def stall_seconds(folder: Path, tokenizer: Any, scale: int) -> dict[str, Any]:
    """Seconds that the slowest of some steps waits for its batch, and what one batch costs."""
    num_rows, compute_s = STEP_ROWS // scale, COMPUTE_S / scale
    data = DataConfig(path=str(folder / "a.jsonl"), num_workers=1, cache_dir=str(folder / "cache"))
    before, _ = waits(TokenStream(data, tokenizer, seq_length=STEP_LENGTH, seed=1), num_rows, compute_s)
    stream = PrefetchingStream(TokenStream(data, tokenizer, seq_length=STEP_LENGTH, seed=1))
    after, worker_s = waits(stream, num_rows, compute_s)
    indexed = DataConfig(path=str(folder / "a.idx"), num_workers=0, cache_dir=str(folder / "cache"))
    pairs, _ = waits(
        PrefetchingStream(TokenStream(indexed, tokenizer, seq_length=STEP_LENGTH, seed=1)), num_rows, compute_s
    )
    tokens = num_rows * STEP_LENGTH
    return {
        "stall_s": max(after),
        "stall_without_prefetching_s": max(before),
        "stall_bin_s": max(pairs),
        "batch_tokens": tokens,
        "compute_s": compute_s,
        "producer_to_compute": worker_s / compute_s,
        "worker_tokens_per_cpu_second": tokens / worker_s,
        "waits_s": {"prefetching": after, "without": before, "bin": pairs},
    }


def waits(stream: TokenStream | PrefetchingStream, num_rows: int, compute_s: float) -> tuple[list[float], float]:
    """Seconds of each call after the first, with compute between calls, and the workers' CPU seconds for one batch."""
    torch.set_num_threads(1)
    stream.next_batch(num_rows)
    feed = stream.feed if isinstance(stream, TokenStream) else stream.stream.feed
    workers = [psutil.Process(worker.process.pid) for worker in feed.pool.workers]
    found, cpu_s = [], [cpu_seconds(workers)]
    for _ in range(NUM_STEPS):
        compute(compute_s)
        start_s = time.perf_counter()
        stream.next_batch(num_rows)
        found.append(time.perf_counter() - start_s)
        cpu_s.append(cpu_seconds(workers))
    stream.close()
    return found, (cpu_s[-1] - cpu_s[0]) / NUM_STEPS


def compute(cpu_s: float) -> None:
    """Multiply matrices until this thread has used so much CPU time."""
    matrix, end_s = torch.ones(512, 512), time.thread_time() + cpu_s
    while time.thread_time() < end_s:
        torch.mm(matrix, matrix)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU time that these processes have used."""
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def summarise(rows: list[Row], resume: dict[str, Any], trainer: float) -> dict[str, Any]:
    """The flat figures and their rows."""
    slowest = min(row.tokens_per_second for row in rows if row.num_workers == 1)
    return {
        "consumption_ratio": slowest / trainer,
        "stream_tokens_per_second": slowest,
        "trainer_tokens_per_second": trainer,
        "resume_s": resume["ours_s"][-1],
        "datasets_resume_s": resume["datasets_s"][-1],
        "state_bytes": resume["state_bytes"],
        "cases": [*map(asdict, rows), resume],
    }


def show(figures: dict[str, Any]) -> None:
    *rows, resume = figures["cases"]
    print(f"\n{'source':20} {'workers':>8} {'tokens/s':>12}")
    for row in rows:
        print(f"{row['name']:20} {row['num_workers']:8} {row['tokens_per_second']:12,.0f}")
    print(
        f"\nslowest with one worker: {figures['consumption_ratio']:.0f} times the trainer's "
        f"{figures['trainer_tokens_per_second']:,.0f} tokens/s at most"
    )
    print(
        f"\nresume in a JSONL.gz of {resume['file_megabytes']:.0f} MB (copied once in {resume['copy_once_s']:.1f} s), "
        f"state of {resume['state_bytes']} bytes"
    )
    print(f"{'after':>8} {'ours':>9} {'datasets':>9}")
    for share, ours, peer in zip(SHARES, resume["ours_s"], resume["datasets_s"], strict=True):
        print(f"{share:8.0%} {ours:8.2f}s {peer:8.2f}s")
    print(
        f"\nglobal batch of {figures['batch_tokens']:,} tokens, one worker, {figures['compute_s']:g} s of compute: the slowest "
        f"step waits {figures['stall_s']:.3f} s ({figures['stall_without_prefetching_s']:.2f} s without prefetching, "
        f"{figures['stall_bin_s']:.3f} s from .bin/.idx)\nworker: {figures['worker_tokens_per_cpu_second']:,.0f} tokens per "
        f"CPU second, {figures['producer_to_compute']:.2f} of the compute"
    )


if __name__ == "__main__":
    main()
