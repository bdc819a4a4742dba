"""Running statistics: every aggregation of the paper's table 13 against its definition, whatever the split."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_train.config import Aggregation
from minitron_train.pruning import statistics
from minitron_train.pruning.statistics import Moments, distance, over_sequence

S, B, C = 75, 11, 7
DIRECT = {
    Aggregation.mean: lambda x: x.abs().mean(0),
    Aggregation.l2: lambda x: x.square().sum(0).sqrt(),
    Aggregation.var: lambda x: (x - x.mean(0)).square().mean(0),
}
X_SBC = torch.randn(S, B, C, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize(("batch", "sequence"), itertools.product(Aggregation, Aggregation))
@pytest.mark.parametrize("sizes", [(B,), (1,) * B, (3, 7, 1)])
def test_nine_aggregations(batch, sequence, sizes):
    moments = None
    for part in X_SBC.split(list(sizes), dim=1):
        new = Moments.of(over_sequence(part))
        moments = moments.merge(new) if moments else new
    wanted = DIRECT[batch](DIRECT[sequence](X_SBC.double()))
    torch.testing.assert_close(moments.aggregate(sequence, batch), wanted, rtol=1e-6, atol=1e-6)


def test_padding_never_counts():
    lengths = torch.randint(1, S, (B,), generator=torch.Generator().manual_seed(1))
    mask_SB = torch.arange(S)[:, None] < lengths
    found = over_sequence(X_SBC + 1e3 * ~mask_SB[..., None], mask_SB)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[:, b], over_sequence(X_SBC[:length, b : b + 1])[:, 0], rtol=1e-5, atol=1e-5)


def test_bfloat16_activations_are_summed_in_higher_precision():
    x = X_SBC.bfloat16()
    torch.testing.assert_close(over_sequence(x), over_sequence(x.float()), rtol=1e-6, atol=1e-6)


class Reads(TorchDispatchMode):
    """Counts the operators that compute something from a tensor's memory."""

    def __init__(self, x):
        super().__init__()
        self.memory, self.names = x.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        reads = any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == self.memory for x in args)
        if reads and not (func.is_view or func._schema.name == "aten::detach"):
            self.names.append(func._schema.name)
        return out


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_an_activation_is_read_twice_at_most(dtype, most):
    x = X_SBC.to(dtype)
    with Reads(x) as reads:
        over_sequence(x)
    assert 1 <= len(reads.names) <= most, reads.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_does_not_depend_on_the_blocks(monkeypatch, dtype):
    before, after = X_SBC.to(dtype), (X_SBC + 0.3 * X_SBC.flip(0)).to(dtype)
    mask_SB = torch.arange(S)[:, None] < torch.arange(S - B, S)
    wanted = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)
    for num_bytes in (1, 4 * B * C * 16, 2**21):
        monkeypatch.setitem(statistics.SCRATCH_BYTES, "cpu", num_bytes)
        for mask, weight in ((None, torch.ones(S, B)), (mask_SB, mask_SB)):
            expected = torch.stack([(wanted * weight).sum(), weight.double().sum()])
            torch.testing.assert_close(distance(before, after, mask), expected, rtol=1e-6, atol=1e-4)
