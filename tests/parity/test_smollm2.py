"""A real language model: SmolLM2, fetched from its wheel, against transformers, at TP 1 and 3 (it has 3 KV groups)."""

from pathlib import Path

import pytest
import torch

from tests.distributed.test_logits import split_logits
from tests.support.helpers import run_ranks
from tests.support.models import hf_logits


@pytest.mark.parametrize("tp", [1, 3])
def test_logits_equal_transformers(smollm2: Path, tp: int) -> None:
    from tests.distributed.test_logits import TOKENS_BS

    wanted = hf_logits(smollm2, TOKENS_BS)
    for (found,) in run_ranks(split_logits, tp, [smollm2], False):
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
