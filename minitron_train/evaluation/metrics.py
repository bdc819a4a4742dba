"""Metrics of one task: which one is the headline, whether it is a share, and how it is printed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minitron_train.runtime import numbers

PREFERRED = (  # a task's headline metric is the first of these that it has, else its own first; filters follow the comma
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
UNBOUNDED = {"perplexity", "loss", "bits", "likelihood", "bleu", "chrf", "ter"}  # words of metrics that are no share
NO_METRICS = ("rows", "num_fewshot", "version")  # the other numbers of a record


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One model on one task; `value` is None when it was not run, and `reason` says why."""

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
    """Whether a metric lies between 0 and 1 and is printed as percent."""
    return UNBOUNDED.isdisjoint(metric_text(metric).split("_"))


def value_text(metric: str, value: float) -> str:
    """ "43.0 %", or "42.100" where the metric is no share."""
    return numbers.percent(value) if is_share(metric) else f"{value:.3f}"


def ratio_text(metric: str, value: float | None, reference: float | None) -> str:
    """What is kept of a reference: "83.7 %", or "× 1.48" where the metric is no share; "–" where one is missing."""
    if value is None or not reference:
        return "–"
    return numbers.percent(value / reference) if is_share(metric) else f"× {value / reference:.2f}"


def metric_text(metric: str) -> str:
    """Without the name of lm-eval's filter."""
    return metric.partition(",")[0]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of 400 digits
        return None


def metrics_in(entry: Mapping[str, Any]) -> list[str]:
    """Names of what one record of `results` measured, in lm-eval's order, without the standard errors."""
    numeric = [name for name, value in entry.items() if number(value) is not None and name not in NO_METRICS]
    return [name for name in numeric if not metric_text(name).endswith("_stderr")]


def headline(metrics: Iterable[str]) -> str:
    """Which metric of a task stands for it; empty when there is none."""
    found = list(metrics)
    return next((metric for metric in (*PREFERRED, *found) if metric in found), "")


def read_score(entry: Mapping[str, Any], metric: str, reason: str = "") -> Score:
    """The headline numbers of one record of `results` or of its `parts`."""
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
