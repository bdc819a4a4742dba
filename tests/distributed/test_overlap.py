"""Overlapping communication changes no result: gradient sums in the backward pass, weight gathers in the forward pass."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.train import optim
from minitron_train.train.hooks import Hook
from tests.support.helpers import run_ranks
from tests.support.models import EXPERTS, save_tiny
from tests.support.training import Material, assert_equal, make_material, rows, student_of, train_here

PLAIN: dict[str, Any] = {"eval__every_tokens": 3 * 8 * 32}  # every three steps
OVERLAP: dict[str, Any] = PLAIN | {"parallel__overlap_communication": True}
SPLIT: dict[str, Any] = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
HOOK: dict[str, Any] = {"train__hooks": [f"{__name__}.ReadsWeights"]}


class ReadsWeights(Hook):
    """Logs a sum over the student's weights after each step: it differs between ranks that lack others' updates."""

    def after_step(self, training: Any, row: Any) -> dict[str, float]:
        total = sum(weight.detach().double().abs().sum() for weight in training.student.parameters())
        return {"lab.weights": float(total)}


def with_small_buckets(rank: int, world_size: int, runs: list[Any]) -> int:
    """train_here, with buckets of a few thousand weights where megatron-core's default of 40 million would hold all of them.

    Returns:
        The number of gathers that began without waiting for their end.
    """
    from megatron.core.distributed import param_and_grad_buffer

    group, num_begun = param_and_grad_buffer._ParamAndGradBucketGroup, 0
    start = group.start_param_sync

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal num_begun
        start(self, *arguments, **options)
        num_begun += self.param_gather_handle is not None

    optim.DistributedDataParallelConfig = functools.partial(optim.DistributedDataParallelConfig, bucket_size=6000)
    group.start_param_sync = counted
    train_here(rank, world_size, runs)
    return num_begun


def assert_same(folder: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Every logged value is equal but for rounding, and the weights in the checkpoint are."""
    assert_equal(folder, rows(other), tolerance)
    found, wanted = (student_of(run, run.with_name(f"{run.name}_exported_{folder.name}")) for run in (folder, other))
    for name, tensor in wanted.items():
        assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-4, atol=1e-4), name


def test_two_ranks_overlap_and_resume(training: Material, tmp_path: Path) -> None:
    """The output layer of this student is no embedding: no module's forward pass reads it, only the loss does."""
    plain, late = tmp_path / "plain", tmp_path / "late"
    runs = [(training, late, OVERLAP | HOOK | {"stop_in": 5}), (training, late, OVERLAP | HOOK)]
    begun = run_ranks(with_small_buckets, 2, [(training, plain, PLAIN | HOOK), *runs])
    assert begun[0] == begun[1] > 5 * 8, "several buckets in each of eight steps"
    assert_same(late, plain)
    weights = [row["lab.weights"] for row in rows(late)]
    assert weights == pytest.approx([row["lab.weights"] for row in rows(plain)], rel=1e-6)
    found = student_of(late, tmp_path / "exported")
    assert weights[-1] == pytest.approx(float(sum(tensor.double().abs().sum() for tensor in found.values())), rel=1e-12)


def test_four_ranks_overlap(tmp_path: Path) -> None:
    """With tensor parallelism, pipeline stages, and experts that two ranks share."""
    (tmp_path / "dense").mkdir()
    (tmp_path / "experts").mkdir()
    dense = make_material(tmp_path / "dense", "llama")
    experts = make_material(tmp_path / "experts", "llama_untied", save_tiny, model_type="qwen3_moe", **EXPERTS)
    layouts: dict[str, tuple[Material, dict[str, Any]]] = {
        "tp": (dense, SPLIT),
        "pp": (dense, {"parallel__pipeline_model_parallel_size": 2}),
        "ep": (experts, {"parallel__expert_model_parallel_size": 2}),
    }
    runs = [
        (material, tmp_path / f"{name}_{kind}", settings | layout)
        for kind, settings in (("plain", PLAIN), ("late", OVERLAP))
        for name, (material, layout) in layouts.items()
    ]
    assert min(run_ranks(with_small_buckets, 4, runs)) > 3 * 8
    for name in layouts:
        assert_same(tmp_path / f"{name}_late", tmp_path / f"{name}_plain")
