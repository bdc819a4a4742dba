"""Scales, paths and numbers of the report's figures."""

import math

import numpy as np
import pytest

from minitron_train.reporting import charts
from minitron_train.reporting.importance import embedding_chart, held_share, ranked, runs
from minitron_train.reporting.load import kept_masks, rotated_axis
from minitron_train.runtime import numbers
from minitron_train.runtime.files import byte_size


@pytest.mark.parametrize("values", [[0.13, 0.92], [3, 812], [-4.0, 2.0], [0, 0], [5e-6, 2e-4], [7]])
def test_linear_scale_covers_the_values_with_round_ticks(values: list[float]) -> None:
    scale = charts.linear(values)
    assert scale.low <= min(values) and scale.high >= max(values)
    assert 2 <= len(scale.ticks) <= 7
    assert [scale.at(tick) for tick, _ in scale.ticks] == sorted(scale.at(tick) for tick, _ in scale.ticks)
    assert scale.at(scale.low) == 0 and scale.at(scale.high) == 1


@pytest.mark.parametrize("values", [[1.2, 5.9], [18.2, 312.4], [1e-6, 1e3]])
def test_logarithmic_scale(values: list[float]) -> None:
    scale = charts.logarithmic(values)
    assert scale.low < values[0] and scale.high > values[1]
    assert len(scale.ticks) >= 2
    middle = math.sqrt(scale.low * scale.high)
    assert scale.at(middle) == pytest.approx(0.5)
    assert scale.at(-1.0) == 0


def test_polyline_breaks_at_values_that_are_not_finite() -> None:
    x, y = charts.Scale(low=0, high=4), charts.Scale(low=0, high=2)
    path = charts.polyline(x, y, [0, 1, 2, 3, 4], [0, 1, math.nan, 2, 0])
    assert path == "M0 2000L500 1000M1500 0L2000 2000"
    assert charts.dots(x, y, [1, 2], [1, math.inf]) == "M500 1000h0"


def test_buckets_keep_the_mean() -> None:
    values = np.random.default_rng(0).random(10_000)
    tokens, means = charts.buckets(np.arange(10_000.0), values, num=400)
    assert len(means) == 400 and means.mean() == pytest.approx(values.mean())
    assert np.all(np.diff(tokens) > 0)


def test_smoothed_is_a_moving_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, 4.0])
    assert charts.smoothed(values, 3).tolist() == [1.5, 3.0, 4.0, 5.0]
    assert charts.smoothed(values, 1).tolist() == values.tolist()


def test_ranked_buckets() -> None:
    scores, kept = np.array([1.0, 8.0, 2.0, 4.0, 3.0]), np.array([False, True, False, True, False])
    edges, means, flags = ranked(scores, kept, 64)
    assert edges.tolist() == [0, 1, 2, 3, 4, 5]
    assert means.tolist() == [8, 4, 3, 2, 1] and flags.tolist() == [True, True, False, False, False]
    assert list(runs(flags)) == [(0, 2), (2, 5)]
    edges, means, _ = ranked(np.arange(1000.0), np.ones(1000, dtype=bool), 64)
    assert len(means) == 64 and (means * np.diff(edges)).sum() == pytest.approx(np.arange(1000).sum())


def test_held_share() -> None:
    assert held_share(np.array([1.0, 3.0]), np.array([False, True])) == 0.75
    assert math.isnan(held_share(np.array([1.0, 3.0]), np.array([False, False])))


def test_kept_masks_of_dropped_and_uncut_layers() -> None:
    kept = {"layers": np.array([0, 2]), "layers.0.ffn": np.array([1])}
    keys, scores = [f"layers.{i}.ffn" for i in range(3)], [np.zeros(2)] * 3
    masks = kept_masks(kept, keys, scores)
    assert [mask.tolist() for mask in masks] == [[False, True], [False, False], [True, True]]


def test_a_rotated_stream_shows_its_directions() -> None:
    kept = {"embedding.variance": np.array([0.6, 0.3, 0.1]), "embedding.basis": np.zeros((3, 2))}
    chart = embedding_chart(rotated_axis(kept))
    assert chart.title == "Principal directions"
    assert "2 of 3 directions were kept, with 90.0 % of the variance." in chart.caption


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (numbers.short(134_515_008), "134.5 M"),
        (numbers.short(1_000_000), "1 M"),
        (numbers.short(0.2134), "0.213"),
        (byte_size(538_090_408), "538.1 MB"),
        (numbers.tiny(2.5e-5), "2.5e-5"),
        (numbers.tiny(0.0), "0"),
        (numbers.perplexity(None), "–"),
        (numbers.perplexity(math.inf), "inf"),
        (numbers.perplexity(51234.5), "51,234"),
        (numbers.duration(611), "10 min 11 s"),
        (numbers.duration(7260), "2 h 1 min"),
    ],
)
def test_numbers(made: str, expected: str) -> None:
    assert made == expected


def test_rounding_below_zero_adds_no_tick() -> None:
    """The smallest variance of a rotation may be -1e-17."""
    assert charts.linear([0.6, 0.1, -1e-17]).low == 0
    assert charts.linear([0.6, -0.1]).low < 0
