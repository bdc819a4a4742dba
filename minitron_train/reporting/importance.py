"""Figures of importance: the scores of every axis, and the units that pruning kept."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from minitron_train.reporting import charts
from minitron_train.reporting.charts import Chart, Key, Mark, Note
from minitron_train.reporting.load import Axis
from minitron_train.runtime.numbers import count, percent

# L layers, U units of one axis in one layer (heads or neurons), H embedding channels, R rank buckets

NUM_RANKS = 64  # buckets of a layer's ranked neurons, so that 48 layers x 24,576 neurons give a small figure
NUM_CHANNELS = 300  # buckets of the ranked embedding channels
NUM_SHADES = 10
DECADES = 2  # range of the neurons' logarithmic shades
MAX_ROW_PX, MAP_PX = 18, 420
KEYS = [Key(kind="fill", role="kept", text="kept"), Key(kind="fill", role="cut", text="cut")]


def importance_charts(axes: dict[str, Axis], num_query_groups: int | None = None) -> list[Chart]:
    """Draw one figure for each axis that was scored, in reading order. The teacher's KV groups are marked if known."""
    heads = functools.partial(heads_chart, num_query_groups=num_query_groups)
    experts = functools.partial(heads_chart, title="Experts", unit="expert", column="expert")
    made = {"embedding": embedding_chart, "block": block_chart, "heads": heads, "experts": experts, "ffn": ffn_chart}
    charts_made = [make(axes[name]) for name, make in made.items() if name in axes]
    widths = {name: axes[name] for name in ("heads", "ffn") if name in axes and axes[name].kept is not None}
    return [*charts_made, share_chart(widths)] if widths else charts_made


def legend(axis: Axis) -> list[Key]:
    """Return the legend of kept and cut units; empty if all units were kept or nothing was pruned."""
    return KEYS if axis.kept is not None and not all(mask.all() for mask in axis.kept) else []


def masks_of(axis: Axis) -> list[np.ndarray]:
    """Return the masks of kept units per layer; before pruning all units are kept."""
    return axis.kept if axis.kept is not None else [np.ones(len(scores), dtype=bool) for scores in axis.scores]


def ranked(scores_U: np.ndarray, kept_U: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort units by falling importance into at most `num` buckets. Returns edges [R + 1], means [R], mostly kept [R]."""
    order = np.argsort(-scores_U, kind="stable")
    num = min(num, len(order))
    edges = np.linspace(0, len(order), num + 1).round().astype(int)
    sizes = np.diff(edges)
    means = np.add.reduceat(scores_U[order], edges[:-1]) / sizes
    return edges, means, np.add.reduceat(kept_U[order].astype(float), edges[:-1]) / sizes >= 0.5


def runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield start and stop of every run of equal flags."""
    changes = [0, *(np.flatnonzero(np.diff(flags)) + 1), len(flags)]
    yield from itertools.pairwise(changes)


def kept_sentence(axis: Axis, unit: str) -> str:
    """Return a sentence such as "504 of 576 channels were kept, with 97.3 % of the summed importance." """
    if axis.kept is None:
        return f"Nothing has been pruned yet: {count(sum(map(len, axis.scores)))} {unit}."
    scores, kept = np.concatenate(axis.scores), np.concatenate(axis.kept)
    if kept.all():
        return f"All {count(len(kept))} {unit} were kept."
    held = scores[kept].sum() / scores.sum() if scores.sum() else 0.0
    numbers = f"{count(int(kept.sum()))} of {count(len(kept))} {unit} were kept"
    return f"{numbers}, with {percent(held)} of the {'variance' if axis.rotated else 'summed importance'}."


def embedding_chart(axis: Axis) -> Chart:
    """Draw the kept and cut embedding channels by importance, or principal directions by variance."""
    scores_H, kept_H = axis.scores[0], masks_of(axis)[0]
    edges, means, flags = ranked(scores_H, kept_H, NUM_CHANNELS)
    x, y = charts.linear([0, len(scores_H)], num_ticks=5), charts.auto(means, ratio=5)
    x = charts.Scale(low=0, high=len(scores_H), ticks=[tick for tick in x.ticks if tick[0] <= len(scores_H)])
    marks = []
    for start, stop in runs(flags):
        steps = "".join(
            f"V{round((1 - y.at(means[k])) * charts.VIEW)}H{round(x.at(edges[k + 1]) * charts.VIEW)}"
            for k in range(start, stop)
        )
        left, role = round(x.at(edges[start]) * charts.VIEW), "kept" if flags[start] else "cut"
        marks.append(Mark(kind="fill", role=role, path=f"M{left} {charts.VIEW}{steps}V{charts.VIEW}z", opacity=0.3))
        line_start = f"M{left} {round((1 - y.at(means[start])) * charts.VIEW)}"
        marks.append(Mark(kind="line", role=role, path=line_start + steps))
    notes = []
    cuts = list(runs(flags))
    if len(cuts) == 2 and flags[0]:  # exactly the most important units were kept
        at = x.at(int(kept_H.sum()))
        marks.append(Mark(kind="rule", role="ink", path=f"M{round(at * charts.VIEW)} 0V{charts.VIEW}"))
        notes.append(Note(left=at, top=0.02, text=f"cut at {count(int(kept_H.sum()))}", align="right"))
    scale = " (logarithmic)" if y.log else ""
    what, unit = ("Variance", "direction") if axis.rotated else ("Importance", "channel")
    return Chart(
        title="Principal directions" if axis.rotated else "Embedding channels",
        caption=f"{what}{scale} of every {unit} of the residual stream, largest first. "
        + kept_sentence(axis, f"{unit}s"),
        x=x,
        y=y,
        marks=marks,
        notes=notes,
        keys=legend(axis),
        x_label=f"{unit}s, ranked",
    )


def block_chart(axis: Axis) -> Chart:
    """Draw the block importance of every layer."""
    scores_L, kept_L = axis.scores[0], masks_of(axis)[0]
    x, y = charts.index(len(scores_L)), charts.linear(scores_L)
    marks = [
        Mark(
            kind="fill",
            role="kept" if kept_L[i] else "cut",
            path=charts.box(x, y, i + 0.14, i + 0.86, 0, score),
            title=f"layer {i}: {score:.4g}{'' if kept_L[i] else ', dropped'}",
        )
        for i, score in enumerate(scores_L)
        if math.isfinite(score)
    ]
    dropped = [str(i) for i in np.flatnonzero(~kept_L)]
    fate = f"Dropped: {', '.join(dropped)}." if dropped else "No layer was dropped." if axis.kept is not None else ""
    return Chart(
        title="Layers",
        caption="Block importance of each layer: 1 − cos(input, output), a measure of how much the layer changes its input. "
        + fate,
        x=x,
        y=y,
        marks=marks,
        keys=legend(axis),
        x_label="layer",
    )


def map_height(num_layers: int) -> int:
    """Return the height in pixels of a map with one row per layer."""
    return max(120, min(MAP_PX, MAX_ROW_PX * num_layers))


def shade(share: float) -> float:
    """Return the opacity of a cell in NUM_SHADES steps; 0 is the palest."""
    return round(0.1 + 0.9 * round(min(max(share, 0.0), 1.0) * (NUM_SHADES - 1)) / (NUM_SHADES - 1), 2)


def heads_chart(
    axis: Axis,
    num_query_groups: int | None = None,
    title: str = "Attention heads",
    unit: str = "head",
    column: str = "query head",
) -> Chart:
    """Draw layers x heads (or experts), with importance as shade and kept ones outlined."""
    num_layers, num_heads = len(axis.scores), max(map(len, axis.scores))
    x, y = charts.index(num_heads), charts.index(num_layers, down=True)
    outline = legend(axis)
    marks = []
    for i, (scores_U, kept_U) in enumerate(zip(axis.scores, masks_of(axis), strict=True)):
        largest = scores_U.max(initial=0.0) or 1.0
        for k, score in enumerate(scores_U):
            role = "kept" if kept_U[k] else "cut"
            fate = f", {role}" if outline else ""
            marks.append(
                Mark(
                    kind="outlined" if outline and kept_U[k] else "fill",
                    role=role,
                    path=charts.box(x, y, k + 0.07, k + 0.93, i + 0.12, i + 0.88),
                    opacity=shade(score / largest),
                    title=f"layer {i}, {unit} {k}: {score / largest:.2f} of the layer's largest{fate}",
                )
            )
    groups = ""
    if num_query_groups and 1 < num_query_groups < num_heads:
        edges = [round(x.at(g * num_heads / num_query_groups) * charts.VIEW) for g in range(1, num_query_groups)]
        marks.append(Mark(kind="rule", role="ink", path="".join(f"M{edge} 0V{charts.VIEW}" for edge in edges)))
        groups = "; vertical lines separate the KV groups"
    return Chart(
        title=title,
        caption=f"One row per layer, one column per {column}; the shade is the importance relative to the layer's "
        f"largest{groups}. " + kept_sentence(axis, f"{unit}s"),
        x=x,
        y=y,
        marks=marks,
        keys=outline,
        ramp=("0", "the layer's largest"),
        height_px=map_height(num_layers),
        x_label=column,
        grid=False,
    )


def ffn_chart(axis: Axis) -> Chart:
    """Draw layers x ranked neurons, with importance as a logarithmic shade and the cut as a change of colour."""
    num_layers = len(axis.scores)
    x, y = charts.linear([0, 1], label=lambda share: percent(share, 0)), charts.index(num_layers, down=True)
    cells: dict[tuple[str, float], str] = {}
    for i, (scores_U, kept_U) in enumerate(zip(axis.scores, masks_of(axis), strict=True)):
        edges, means, flags = ranked(scores_U, kept_U, NUM_RANKS)
        largest = means.max(initial=0.0) or 1.0
        for k, mean in enumerate(means):
            strength = 1 + math.log10(max(mean / largest, 1e-9)) / DECADES
            key = ("kept" if flags[k] else "cut", shade(strength))
            left, right = edges[k] / len(scores_U), edges[k + 1] / len(scores_U)
            cells[key] = cells.get(key, "") + charts.box(x, y, left, right, i + 0.06, i + 0.94)
    sizes = [int(mask.sum()) for mask in masks_of(axis) if mask.any()]
    width = f"{count(min(sizes))} to {count(max(sizes))}" if len(set(sizes)) > 1 else count(sizes[0]) if sizes else "0"
    return Chart(
        title="MLP neurons",
        caption="One row per layer: its neurons from most to least important; the shade is the importance relative to "
        f"the layer's largest, on a logarithmic scale. {kept_sentence(axis, 'neurons')} "
        f"Per layer: {width} of {count(max(map(len, axis.scores)))}.",
        x=x,
        y=y,
        marks=[Mark(kind="fill", role=role, path=path, opacity=opacity) for (role, opacity), path in cells.items()],
        keys=legend(axis),
        ramp=(f"≤ {100 / 10**DECADES:.0f} %", "the layer's largest"),
        height_px=map_height(num_layers),
        x_label="neurons, ranked",
        grid=False,
    )


def share_chart(axes: dict[str, Axis]) -> Chart:
    """Draw the fraction of each layer's importance that was kept, and the fraction of its units."""
    styles = {"heads": ("student", "heads"), "ffn": ("pruned", "MLP neurons")}
    num_layers = max(len(axis.scores) for axis in axes.values())
    x = charts.index(num_layers)
    centres = np.arange(num_layers) + 0.5
    held = {
        name: [held_share(*pair) for pair in zip(axis.scores, masks_of(axis), strict=True)]
        for name, axis in axes.items()
    }
    units = {name: mean_share(masks_of(axis)) for name, axis in axes.items()}
    lowest = min(
        (share for shares in (*held.values(), list(units.values())) for share in shares if share == share), default=0
    )
    y = charts.linear([math.floor(lowest * 10) / 10, 1], label=lambda share: percent(share, 0), zero=False)
    marks, keys = [], []
    for name, shares in held.items():
        role, text = styles[name]
        marks += [
            Mark(kind="dashed", role=role, path=charts.level(x, y, units[name])),
            Mark(kind="line", role=role, path=charts.polyline(x, y, centres, shares)),
            Mark(kind="dots", role=role, path=charts.dots(x, y, centres, shares)),
        ]
        keys.append(Key(kind="line", role=role, text=f"{text} (dashed: {percent(units[name])} of them kept)"))
    return Chart(
        title="Importance kept, layer by layer",
        caption="Fraction of each layer's summed importance in its kept heads and neurons; dashed: fraction of units kept. "
        "A line near its dashed level means that the layer's units have about equal importance.",
        x=x,
        y=y,
        marks=marks,
        keys=keys,
        x_label="layer",
        wide=True,
    )


def held_share(scores_U: np.ndarray, kept_U: np.ndarray) -> float:
    """Return the fraction of a layer's importance that was kept; NaN for a dropped layer."""
    return float(scores_U[kept_U].sum() / scores_U.sum()) if kept_U.any() and scores_U.sum() else math.nan


def mean_share(masks: Sequence[np.ndarray]) -> float:
    """Return the mean fraction of kept units over the remaining layers."""
    shares = [float(mask.mean()) for mask in masks if mask.any()]
    return sum(shares) / len(shares) if shares else math.nan
