"""Sinks of a run's metrics (metrics.jsonl, the console), and the throughput meter."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch

from minitron_train.runtime.console import PLAIN_INTERVAL_S, say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_text, disk_errors
from minitron_train.runtime.records import Count, Integer, Lines, read_lines, set_aside

Metrics = dict[str, Any]


class Step(TypedDict):
    """The one required field of a line in metrics.jsonl."""

    step: Count


FIGURES = msgspec.json.Decoder(dict[str, Integer | float | str | bool | None])
STEP = msgspec.json.Decoder(Step)


class MetricsFile:
    """metrics.jsonl: one JSON object per line. Each step appears at most once, even after kills and restarts."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file for appending after `step`. Remove lines of later steps and a line that a kill cut off.

        A damaged file is kept as metrics.jsonl.damaged-N; its valid lines are copied to the new file.
        """
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                rows = {row["step"]: row for row in repaired_rows(path) if row["step"] <= step}
                atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows.values()))
            self.handle = path.open("a", encoding="utf-8")

    def write(self, row: Metrics) -> None:
        """Append one line. Values that are not finite become null."""
        self.handle.write(json.dumps({key: finite(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self.handle.flush()

    def close(self, *, failed: bool = False) -> None:
        self.handle.close()


def repaired_rows(path: Path) -> list[Metrics]:
    """Return the valid lines of a metrics.jsonl. Rename the file if it has damaged lines or is not a regular file."""
    try:
        found = read_rows(path)
    except (UserError, FileNotFoundError) as error:  # FileNotFoundError: a broken link
        say(f"{error}; kept as {set_aside(path).name}, writing a new file")
        return []
    if found.damaged:
        number, why = next(iter(found.damaged.items()))
        where = f"{path}: {len(found.damaged)} damaged lines, the first is line {number} ({why})"
        say(f"{where}; kept as {set_aside(path).name}, copied the other lines")
    return found.values


def read_rows(path: Path) -> Lines[Metrics]:
    """Read a metrics.jsonl. A valid row has a `step`; its values are numbers, strings, booleans or null.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the path is not a regular file.
    """
    return read_lines(path, decode_row)


def decode_row(line: bytes) -> Metrics:
    """Decode one line of metrics.jsonl; raises msgspec's errors."""
    row = FIGURES.decode(line)
    STEP.decode(line)
    return row


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ThroughputMeter:
    """Tokens per second since the last reading, and model FLOPs as a share of what the devices can do.

    `gemm_utilisation` is the share of the matrix product's rate that was timed at start. `mfu` (model FLOPs utilisation,
    arXiv 2204.02311) is the share of the data sheet's peak; it is missing where that is unknown, as on CPUs.
    """

    def __init__(
        self,
        flops_per_token: float,
        gemm_flops_per_second: float,
        num_devices: int,
        data_sheet_flops_per_second: float | None = None,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.full_rates = {"gemm_utilisation": gemm_flops_per_second * num_devices}  # FLOP/s of all devices
        if data_sheet_flops_per_second is not None:
            self.full_rates["mfu"] = data_sheet_flops_per_second * num_devices
        self.tokens, self.seconds, self.mark_s = 0, 0.0, time.perf_counter()

    def resume(self) -> None:
        """Restart the clock; time before this call does not count."""
        self.mark_s = time.perf_counter()

    def count(self, tokens: int) -> None:
        """Add `tokens`, processed since the last call of `count` or `resume`."""
        now_s = time.perf_counter()
        self.tokens, self.seconds, self.mark_s = self.tokens + tokens, self.seconds + now_s - self.mark_s, now_s

    def read(self) -> Metrics:
        """Return averages since the last reading, or None values if no step was taken since.

        No step was taken when this process only evaluates a step of an earlier process.
        """
        if not self.tokens:
            return {"tokens_per_second": None, **dict.fromkeys(self.full_rates)}
        rate = self.tokens / max(self.seconds, 1e-9)
        self.tokens, self.seconds = 0, 0.0
        shares = {name: rate * self.flops_per_token / full for name, full in self.full_rates.items()}
        return {"tokens_per_second": rate, **shares}


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated GPU memory on CUDA, otherwise resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Console:
    """Shows progress on rank 0: a bar on a terminal, otherwise at most one line every PLAIN_INTERVAL_S seconds."""

    def __init__(self, label: str, step: int, num_steps: int) -> None:
        self.label, self.num_steps, self.first_step = label, num_steps, step
        self.start_s, self.said_s = time.monotonic(), -math.inf
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc=label, initial=step, total=num_steps, unit="step", leave=False)

    def write(self, row: Metrics) -> None:
        """Show the metrics of one step."""
        speed = row["tokens_per_second"]
        figures = f"loss {row['loss']:.4f}" + (f", {speed:,.0f} tokens/s" if speed else "")
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(row["step"] - self.bar.n)
            return
        now_s, last = time.monotonic(), row["step"] == self.num_steps
        if last or now_s - self.said_s > PLAIN_INTERVAL_S:
            self.said_s = now_s
            done, to_do = row["step"] - self.first_step, self.num_steps - row["step"]
            left = f", about {(now_s - self.start_s) / done * to_do:.0f} s left" if done else ""
            say(f"{self.label}: step {row['step']}/{self.num_steps}, {figures}{left}")

    def close(self, *, failed: bool = False) -> None:
        if self.bar is not None:
            self.bar.close()
