"""Sections cluster, plan: the machines that `plan` assumes, and what it compares."""

from dataclasses import dataclass

from minitron_train.arch.shape import SIZES
from minitron_train.config.base import opt, require, require_positive
from minitron_train.config.model import StudentConfig


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines that `plan` assumes; null values are measured on this machine."""

    name: str = opt("local", "name of the hardware; written to plan.json")
    num_nodes: int = opt(1, "number of machines")
    gpus_per_node: int = opt(1, "GPUs per machine; each has one process")
    memory_gib: float | None = opt(None, "memory of one GPU, GiB; null: the free memory of this machine")
    peak_tflops: float | None = opt(
        None, "dense bf16 peak of one GPU, TFLOP/s; null: time a matrix product on this machine"
    )
    fp32_tflops: float | None = opt(None, "fp32 peak of one GPU, TFLOP/s, for scoring; null: peak_tflops")
    memory_gb_per_s: float | None = opt(None, "memory bandwidth of one GPU, GB/s; null: time a copy on this machine")
    intra_node_gb_per_s: float = opt(1.0, "bandwidth between GPUs of one machine, GB/s per GPU and direction")
    inter_node_gb_per_s: float = opt(1.0, "bandwidth between machines, GB/s per GPU and direction")
    gemm_efficiency: float = opt(
        0.85, "fraction of the peak that matrix products reach (not MFU); lower values plan more hours"
    )
    reserved_gib: float = opt(3.0, "memory of each GPU kept free for CUDA, NCCL and fragmentation, GiB")
    price_per_gpu_hour: float | None = opt(None, "price, dollars per GPU and hour; null: print no price")

    def validate(self) -> None:
        names = ("num_nodes", "gpus_per_node", "memory_gib", "peak_tflops", "fp32_tflops", "memory_gb_per_s")
        require_positive(self, "cluster", *names, "intra_node_gb_per_s", "inter_node_gb_per_s", "price_per_gpu_hour")
        require(
            0 < self.gemm_efficiency <= 1,
            "cluster.gemm_efficiency",
            self.gemm_efficiency,
            "must be above 0 and at most 1",
            "0.85 is usual",
        )
        reserved = self.reserved_gib
        require(reserved >= 0, "cluster.reserved_gib", reserved, "must not be negative", "0 reserves nothing")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `plan` compares, and whether other commands refuse runs that do not fit."""

    check: bool = opt(True, "reject a run that does not fit into memory or on disk")
    pretraining_tokens: float | None = opt(
        None, "training tokens of one model from scratch; plan compares this cost with pruning and distilling"
    )
    family: dict[str, StudentConfig] = opt(
        dict, "students to compare with pretraining_tokens, by name; empty: the recipe's"
    )

    def validate(self) -> None:
        require_positive(self, "plan", "pretraining_tokens")
        for name, student in self.family.items():
            require_positive(student, f"plan.family.{name}", *SIZES)
