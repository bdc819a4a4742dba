"""Running statistics: every aggregation of the paper's table 13 against its definition, whatever the split."""

import itertools

import pytest
import torch

from minitron_train.config import Aggregation
from minitron_train.pruning.statistics import Moments, over_sequence

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
