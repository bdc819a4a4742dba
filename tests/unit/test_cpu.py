"""CUDA's meaning on a machine without it."""

import torch

from minitron_train.parallel import cpu


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
