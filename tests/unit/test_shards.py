"""Boxes of a checkpoint: they cover an interval in order, ranks share state equally, earlier checkpoints resume."""

import itertools
from math import prod
from pathlib import Path
from unittest import mock

import pytest
import torch

from minitron_train.arch.shape import rows_without_padding
from minitron_train.config import Precision
from minitron_train.train.shards import Held, boxes, own_share, with_padding
from tests.support.training import Interrupted, Material, before_step, former_state, interrupt, rows, run


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2)])
def test_boxes_hold_an_interval_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(prod(shape) + 1), 2):
        found = boxes(shape, start, stop)
        values = [
            whole[tuple(slice(k, k + size) for k, size in zip(*box, strict=True))].reshape(-1).tolist() for box in found
        ]
        assert [value for part in values for value in part] == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_ranks_share_all_elements_equally(size: int) -> None:
    """Two whole weights, and the middle of a third."""
    lengths = ((0, 5), (0, 20), (3, 10))
    held = [
        Held(torch.zeros(20), start, stop, {"exp_avg": torch.arange(start, stop) + 100 * k})
        for k, (start, stop) in enumerate(lengths)
    ]
    shares = [list(own_share(held, rank, size)) for rank in range(size)]
    values = [int(value) for share in shares for part in share for value in part.state["exp_avg"]]
    assert values == [100 * k + value for k, (start, stop) in enumerate(lengths) for value in range(start, stop)]
    counts = [sum(part.stop - part.start for part in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    for part in itertools.chain.from_iterable(shares):
        assert [int(value) % 100 for value in part.state["exp_avg"]] == list(range(part.start, part.stop))


@pytest.mark.parametrize("precision", list(Precision))
def test_a_checkpoint_in_the_former_format_resumes(training: Material, tmp_path: Path, precision: Precision) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(training, whole, train__precision=precision)
    former = mock.patch("minitron_train.train.optim.Optimizer.state_to_save", former_state)
    with former, before_step(5, interrupt), pytest.raises(Interrupted):
        run(training, resumed, train__precision=precision)
    assert run(training, resumed, train__precision=precision)["resumed_at_step"] == 3
    assert rows(resumed) == rows(whole)


def test_a_loaded_vocabulary_gets_its_padding_back() -> None:
    """All stored rows, then padding of any value; what has no padding is given back as it is."""
    padded, plain = torch.nn.Parameter(torch.full((6, 2), 9.0)), torch.nn.Parameter(torch.zeros(3))
    padded.real_rows = 5  # pyright: ignore[reportAttributeAccessIssue]
    stored = {"embedding": torch.arange(10.0).view(5, 2), "norm": torch.ones(3)}
    found = with_padding(stored, {"embedding": padded, "norm": plain})
    assert found["embedding"].shape == (6, 2) and torch.equal(found["embedding"][:5], stored["embedding"])
    assert found["norm"] is stored["norm"] and torch.equal(padded, torch.full((6, 2), 9.0))


@pytest.mark.parametrize(("rank", "real"), [(0, 4), (1, 3), (2, 0)])
def test_rows_of_a_rank_without_padding(rank: int, real: int) -> None:
    assert rows_without_padding(7, rank, 4) == real
