"""Metrics of one task: the headline metric, whether it is a fraction between 0 and 1, and its text form."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minitron_train.runtime import numbers

PREFERRED = (  # the first of these that a task has is its headline, else its own first metric; METRIC,FILTER
    "acc_norm",
    "acc",
    "exact_match",
    "exact_match,flexible-extract",
    "exact_match,strict-match",
    "pass@1",
    "pass_at_1",
    "pass_at_1,create_test",
    "rougeL",
    "word_perplexity",
)
UNBOUNDED = {
    "perplexity",
    "loss",
    "bits",
    "likelihood",
    "bleu",
    "chrf",
    "ter",
}  # words in names of metrics that are not fractions
NO_METRICS = ("rows", "num_fewshot", "version")  # numbers of a record that are not metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The score of one model on one task. `value` is None if the task was not run; `reason` says why."""

    metric: str
    value: float | None = None
    stderr: float | None = None
    rows: int | None = None
    num_fewshot: int | None = None
    reason: str = ""

    @property
    def text(self) -> str:
        """ "43.0 ± 4.9 %", "0.213 ± 0.010" or "not run"."""
        if self.value is None:
            return "not run"
        if self.stderr is None:
            return value_text(self.metric, self.value)
        if is_share(self.metric):
            return f"{self.value * 100:.1f} ± {self.stderr * 100:.1f} %"
        return f"{self.value:.3f} ± {self.stderr:.3f}"


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction between 0 and 1, printed as a percentage."""
    return UNBOUNDED.isdisjoint(metric_text(metric).split("_"))


def value_text(metric: str, value: float) -> str:
    """ "43.0 %" for a fraction, "42.100" for another metric."""
    return numbers.percent(value) if is_share(metric) else f"{value:.3f}"


def ratio_text(metric: str, value: float | None, reference: float | None) -> str:
    """The ratio to a reference: "83.7 %" for a fraction, "× 1.48" for another metric, "–" if a value is missing."""
    if value is None or not reference:
        return "–"
    return numbers.percent(value / reference) if is_share(metric) else f"× {value / reference:.2f}"


def metric_text(metric: str) -> str:
    """Return the metric's name without lm-eval's filter."""
    return metric.partition(",")[0]


def number(value: Any) -> float | None:
    """Return a finite number, or None for any other value."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of a float
        return None


def metrics_in(entry: Mapping[str, Any]) -> list[str]:
    """Return the metric names of one record of `results`, in lm-eval's order, without standard errors."""
    numeric = [name for name, value in entry.items() if number(value) is not None and name not in NO_METRICS]
    return [name for name in numeric if not metric_text(name).endswith("_stderr")]


def headline(metrics: Iterable[str]) -> str:
    """Return a task's headline metric; an empty string if it has no metric."""
    found = list(metrics)
    return next((metric for metric in (*PREFERRED, *found) if metric in found), "")


def read_score(entry: Mapping[str, Any], metric: str, reason: str = "") -> Score:
    """Read one metric from a record of `results` or of its `parts`."""
    name, comma, filter_name = metric.partition(",")
    rows, shots = number(entry.get("rows")), number(entry.get("num_fewshot"))
    return Score(
        metric=metric,
        value=number(entry.get(metric)),
        stderr=number(entry.get(f"{name}_stderr{comma}{filter_name}")),
        rows=None if rows is None else int(rows),
        num_fewshot=None if shots is None else int(shots),
        reason=reason,
    )
