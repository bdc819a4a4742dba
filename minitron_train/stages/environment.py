"""What provenance.json records about the process: time, memory, package versions, the commit of the code."""

import datetime
import functools
import importlib.metadata
import subprocess
import time
from pathlib import Path

PACKAGES = (
    "minitron_train",
    "torch",
    "megatron-core",
    "transformers",
    "datasets",
    "hydra-core",
    "lm_eval",
    "wandb",
    "numpy",
)


class Meter:
    """Wall time and peak memory of a stage. The kernel's high-water mark is reset at the start if that is allowed."""

    def __init__(self) -> None:
        self.started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self.start_s = time.perf_counter()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # the peak is then that of the process, not of the stage

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start_s

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory (VmHWM: mapped file pages count) of this process."""
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return 0
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@functools.cache
def package_versions() -> dict[str, str]:
    """Installed versions of the PACKAGES that decide results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with -dirty if files differ; None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
