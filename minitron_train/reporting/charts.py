"""Charts as data: scales and SVG paths. The template draws them; the style sheet colours them (light, dark, print).

The plot area is an SVG square of VIEW x VIEW units, which the browser stretches to the available space. Labels are HTML
outside of it, so that text keeps its size on a phone and on paper. Strokes do not scale, so a dot is a stroke of length
zero with round ends.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minitron_train.runtime.numbers import short

VIEW = 2000  # units of the stretched square; whole numbers keep the page small
MAX_POINTS = 400  # maximum points of a line; longer series are averaged over buckets

Label = Callable[[float], str]
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Maps values to a position between 0 (left, bottom) and 1. With `low` > `high` the axis is reversed."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False

    def at(self, value: float) -> float:
        """Return the position of a value, clamped to the plot."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        point = math.log(max(value, 1e-300)) if self.log else value
        return min(max((point - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One SVG path. `kind` selects its style (line, thin, dashed, rule, dots, fill, outlined), `role` its colour."""

    kind: str
    role: str
    path: str
    opacity: float = 1.0
    title: str = ""  # tooltip


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Text inside the plot, at a position between 0 and 1 from the left and from the top; `align` left or right."""

    left: float
    top: float
    text: str
    role: str = "ink"
    align: str = "left"


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One entry of a legend."""

    kind: str
    role: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A figure: title, caption, scales, marks and legend."""

    title: str
    caption: str
    x: Scale
    y: Scale
    marks: list[Mark]
    x_label: str = ""
    keys: list[Key] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    height_px: int = 220
    ramp: tuple[str, str] | None = None  # legend of shades: the values of the palest and the strongest shade
    grid: bool = True
    wide: bool = False  # spans the whole row of the page


def linear(values: Values, label: Label = short, zero: bool = True, num_ticks: int = 4) -> Scale:
    """Return a linear scale over the finite values, with round ticks; `zero` includes 0."""
    finite = [float(value) for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    if high == low:
        high = low + (abs(low) or 1.0)
    step = round_step((high - low) / num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(k * step, label(round(k * step, 12))) for k in range(first, last + 1)]
    return Scale(low=first * step, high=last * step, ticks=ticks)


def logarithmic(values: Values, label: Label = short) -> Scale:
    """Return a logarithmic scale over the positive finite values. Over few decades it has ticks between powers of ten."""
    finite = [float(value) for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(finite), max(finite)
    pad = max((high / low) ** 0.06, 1.05)
    low, high = low / pad, high * pad
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if high / low > 300 else (1, 3) if high / low > 30 else (1, 2, 5)
    ticks = [step * 10.0**k for k in decades for step in steps]
    return Scale(low=low, high=high, log=True, ticks=[(tick, label(tick)) for tick in ticks if low <= tick <= high])


def wide_range(values: Values, ratio: float) -> bool:
    """Whether the values are positive and their largest ratio exceeds `ratio`, so that a logarithmic scale suits them."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > ratio


def auto(values: Values, label: Label = short, *, ratio: float = 20.0, zero: bool = True) -> Scale:
    """Return a logarithmic scale if the values span a wide range, a linear one otherwise."""
    return logarithmic(values, label) if wide_range(values, ratio) else linear(values, label, zero)


def round_step(step: float) -> float:
    """Round a step up to 1, 2, 2.5 or 5 times a power of ten."""
    base = 10.0 ** math.floor(math.log10(step))
    return next(factor * base for factor in (1, 2, 2.5, 5, 10) if factor * base >= step * (1 - 1e-9))


def index(num: int, *, centred: bool = True, down: bool = False) -> Scale:
    """Return a scale over `num` cells 0, 1, …, with at most about ten ticks; `centred` puts ticks in the middle of cells."""
    step = max(1, math.ceil(num / 10))
    step = next(nice for nice in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**9) if nice >= step)
    ticks = [(i + 0.5 * centred, str(i)) for i in range(0, num, step)]
    return Scale(low=num, high=0, ticks=ticks) if down else Scale(low=0, high=num, ticks=ticks)


def point(x: Scale, y: Scale, x_value: float, y_value: float) -> str:
    """Return SVG coordinates such as "120 840", counted from the top left."""
    return f"{round(x.at(x_value) * VIEW)} {round((1 - y.at(y_value)) * VIEW)}"


def polyline(x: Scale, y: Scale, xs: Values, ys: Values) -> str:
    """Return a path through the points, interrupted where a value is not finite."""
    parts, pen_down = [], False
    for x_value, y_value in zip(xs, ys, strict=True):
        if not (math.isfinite(x_value) and math.isfinite(y_value)):
            pen_down = False
            continue
        parts.append(("L" if pen_down else "M") + point(x, y, x_value, y_value))
        pen_down = True
    return "".join(parts)


def dots(x: Scale, y: Scale, xs: Values, ys: Values) -> str:
    """Return a path with one round dot per finite point."""
    pairs = zip(xs, ys, strict=True)
    return "".join(f"M{point(x, y, *pair)}h0" for pair in pairs if all(math.isfinite(value) for value in pair))


def box(x: Scale, y: Scale, left: float, right: float, bottom: float, top: float) -> str:
    """Return the path of a rectangle between values of both scales."""
    x0, x1 = sorted(round(x.at(value) * VIEW) for value in (left, right))
    y0, y1 = sorted(round((1 - y.at(value)) * VIEW) for value in (bottom, top))
    return f"M{x0} {y0}h{x1 - x0}v{y1 - y0}h{x0 - x1}z"


def level(x: Scale, y: Scale, value: float) -> str:
    """Return a horizontal line across the whole plot."""
    return f"M{point(x, y, x.low, value)}H{VIEW}"


def buckets(xs: np.ndarray, ys: np.ndarray, num: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce the finite points [T] to at most `num` by averaging buckets of neighbours."""
    valid = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[valid], ys[valid]
    if len(xs) <= num:
        return xs, ys
    starts = np.linspace(0, len(xs), num, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(xs)])
    return np.add.reduceat(xs, starts) / sizes, np.add.reduceat(ys, starts) / sizes


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving mean over `window` neighbours (fewer at the ends), [T] -> [T]."""
    sums = np.cumsum([0.0, *values])
    centre = np.arange(len(values))
    start, stop = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)
