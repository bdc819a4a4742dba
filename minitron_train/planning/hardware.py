"""Rates and sizes of a machine, from the table in conf/cluster or measured here. Only a measurement imports torch."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from minitron_train.config import ClusterConfig, Precision

GIB = 2**30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
DATA_SHEET_TFLOPS = {  # dense bf16 peak by a part of CUDA's name of the device (NVIDIA's data sheets); the first match counts
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "B200": 2250,
    "L40S": 362,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One GPU (or process), its links, and the number of GPUs. Rates are per second, sizes in bytes."""

    name: str
    num_gpus: int
    gpus_per_node: int
    memory_bytes: int
    reserved_bytes: int  # CUDA context, NCCL, fragmentation; 0 without CUDA (planning.memory.RUNTIME_BYTES instead)
    peak_flops: float
    fp32_flops: float
    gemm_efficiency: float
    memory_rate: float
    intra_node_rate: float
    inter_node_rate: float
    price_per_gpu_hour: float | None
    cuda: bool
    measured: bool

    @property
    def flops(self) -> float:
        """Expected FLOP/s of matrix products in a step."""
        return self.peak_flops * self.gemm_efficiency

    def link_rate(self, num_ranks: int) -> float:
        """Return the bytes per second between a GPU and the others of its group of `num_ranks` neighbouring GPUs."""
        return self.intra_node_rate if num_ranks <= self.gpus_per_node else self.inter_node_rate


def hardware(cluster: ClusterConfig, precision: Precision) -> Hardware:
    """Return the table's values. Missing ones are measured on this machine; without CUDA its processes share them."""
    measured = not is_described(cluster)
    cuda = cuda_here() if measured else True
    share = 1 if cuda else cluster.gpus_per_node
    peak = cluster.peak_tflops * 1e12 if cluster.peak_tflops else gemm_flops(precision, cuda) / share
    fp32 = cluster.fp32_tflops * 1e12 if cluster.fp32_tflops else peak
    if measured and not (cuda or cluster.peak_tflops) and precision is not Precision.fp32:
        fp32 = gemm_flops(Precision.fp32, cuda) / share
    memory = int(cluster.memory_gib * GIB) if cluster.memory_gib else memory_here(cuda) // share
    rate = cluster.memory_gb_per_s * 1e9 if cluster.memory_gb_per_s else copy_rate(cuda) / share
    return Hardware(
        name=cluster.name,
        num_gpus=cluster.num_nodes * cluster.gpus_per_node,
        gpus_per_node=cluster.gpus_per_node,
        memory_bytes=memory,
        reserved_bytes=int(cluster.reserved_gib * GIB) if cuda else 0,
        peak_flops=peak,
        fp32_flops=fp32,
        gemm_efficiency=cluster.gemm_efficiency,
        memory_rate=rate,
        intra_node_rate=cluster.intra_node_gb_per_s * 1e9,
        inter_node_rate=cluster.inter_node_gb_per_s * 1e9,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
        cuda=cuda,
        measured=measured,
    )


def is_described(cluster: ClusterConfig) -> bool:
    """Whether the table has all rates and sizes of a GPU, so that nothing is measured here."""
    return None not in (cluster.peak_tflops, cluster.memory_gib, cluster.memory_gb_per_s)


def cuda_here() -> bool:
    """Whether this machine has a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


def data_sheet_flops(device_name: str, precision: Precision, cluster: ClusterConfig) -> float | None:
    """Peak FLOP/s of a GPU on its data sheet: by name, else cluster.peak_tflops; None in fp32 or where neither is known."""
    if precision is not Precision.bf16:
        return None
    tflops = next((value for part, value in DATA_SHEET_TFLOPS.items() if part in device_name), cluster.peak_tflops)
    return tflops * 1e12 if tflops else None


def gemm_flops(
    precision: Precision, cuda: bool, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Measure the FLOP/s of a square matrix product, as a median of `repeats`. Takes a fraction of a second."""
    import torch

    device = "cuda" if cuda else "cpu"
    size = GEMM_SIZE[device]
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    left, right, out = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    return 2 * size**3 / median_seconds(lambda: torch.mm(left, right, out=out), cuda, repeats, clock)


def copy_rate(cuda: bool, repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the bytes per second, read plus written, of copying arrays larger than any cache."""
    import torch

    device = "cuda" if cuda else "cpu"
    source = torch.ones((256 if cuda else 32) * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), cuda, repeats, clock)


def median_seconds(work: Callable[[], object], cuda: bool, repeats: int, clock: Callable[[], float]) -> float:
    """Return the median seconds of one call of `work`, after one warm-up call."""
    import torch

    seconds = []
    for _ in range(repeats + 1):
        start_s = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start_s)
    return median(seconds[1:])


def memory_here(cuda: bool) -> int:
    """Return the memory of one GPU, or the available memory of this machine within its control group, in bytes."""
    if cuda:
        import torch

        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return min([available, *filter(None, map(control_group_left, CGROUP_LIMITS))])


def control_group_left(limit_file: str) -> int | None:
    """Return the bytes that the control group can still allocate; None without a limit. Cached file pages count as free."""
    path = Path(limit_file)
    usage = path.with_name("memory.current" if path.name == "memory.max" else "memory.usage_in_bytes")
    try:
        limit, used = int(path.read_text()), int(usage.read_text())
        statistics = dict(line.split() for line in path.with_name("memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cached = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return max(limit - used + cached, 0) if limit < 2**60 else None
