"""The compatibility layer: every symbol that it replaces still exists in megatron-core."""

import megatron.core.tensor_parallel.random as megatron_random
import pytest
import torch

from minitron_train.parallel import cpu


@pytest.mark.parametrize(
    "name",
    ["_get_cuda_rng_state", "_set_cuda_rng_state", "CudaRNGStatesTracker", "_MODEL_PARALLEL_RNG_TRACKER_NAME"],
)
def test_replaced_symbols_exist(name: str) -> None:
    assert hasattr(megatron_random, name)


def test_cuda_literals_mean_the_cpu_inside_the_block_only() -> None:
    with cpu.cuda_means_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda:0").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_named_random_states_are_independent_of_the_default_one() -> None:
    tracker = cpu.CpuRngTracker()
    tracker.add("model", 5)
    torch.manual_seed(0)
    plain = torch.rand(2)
    torch.manual_seed(0)
    with tracker.fork("model"):
        forked = torch.rand(2)
    assert torch.equal(torch.rand(2), plain)
    assert not torch.equal(forked, plain)
    with tracker.fork("model"):
        assert not torch.equal(torch.rand(2), forked)
