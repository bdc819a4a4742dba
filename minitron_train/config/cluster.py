"""Sections cluster, plan: the machines that `plan` reckons with, and what it compares."""

from dataclasses import dataclass

from minitron_train.arch.shape import SIZES
from minitron_train.config.base import opt, require, require_positive
from minitron_train.config.model import StudentConfig


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines that `plan` reckons with; what is null is measured on this one."""

    name: str = opt("local", "of the hardware; goes into plan.json")
    num_nodes: int = opt(1, "machines")
    gpus_per_node: int = opt(1, "processes per machine, one per GPU")
    memory_gib: float | None = opt(None, "of one GPU; null: what this machine has left")
    peak_tflops: float | None = opt(None, "dense bf16 peak of one GPU; null: a matrix product is timed here")
    fp32_tflops: float | None = opt(None, "fp32 peak of one GPU, for scoring; null: the same as peak_tflops")
    memory_gb_per_s: float | None = opt(None, "memory bandwidth of one GPU, 1e9 bytes a second; null: timed here")
    intra_node_gb_per_s: float = opt(1.0, "one GPU to its neighbours, one direction, 1e9 bytes a second")
    inter_node_gb_per_s: float = opt(1.0, "one GPU to other nodes, one direction, 1e9 bytes a second")
    gemm_efficiency: float = opt(0.85, "share of the peak that the matrix products of a step reach")
    reserved_gib: float = opt(3.0, "of each GPU's memory: CUDA context, NCCL, fragmentation")
    price_per_gpu_hour: float | None = opt(None, "dollars; null: no price is given")

    def validate(self) -> None:
        """Positive numbers, a share that is one."""
        names = ("num_nodes", "gpus_per_node", "memory_gib", "peak_tflops", "fp32_tflops", "memory_gb_per_s")
        require_positive(self, "cluster", *names, "intra_node_gb_per_s", "inter_node_gb_per_s", "price_per_gpu_hour")
        require(
            0 < self.gemm_efficiency <= 1,
            "cluster.gemm_efficiency",
            self.gemm_efficiency,
            "above 0, at most 1",
            "0.4 is usual",
        )
        reserved = self.reserved_gib
        require(reserved >= 0, "cluster.reserved_gib", reserved, "must not be negative", "0 reserves nothing")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `plan` compares with, and whether the other commands obey it."""

    check: bool = opt(True, "refuse a run whose plan does not fit into memory or disk")
    pretraining_tokens: float | None = opt(None, "tokens of one training from scratch, for the cost of a family")
    family: dict[str, StudentConfig] = opt(dict, "students of one teacher by name; empty: this recipe's student")

    def validate(self) -> None:
        """Positive numbers."""
        require_positive(self, "plan", "pretraining_tokens")
        for name, student in self.family.items():
            require_positive(student, f"plan.family.{name}", *SIZES)
