"""The report of benchmarks/quality/pruning_race.py: headline figures, tables and a figure, from the finished rows.

Every loss is that of a start's best rate for one budget, one text and one measure. So the best rates of two texts may belong to
two students.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from pruning_race_plan import BUDGETS, MODELOPT, OURS
from pruning_race_rows import HEADLINE, MEASURES, TEXTS, Best, Row, Run, amount, best, run_of

from minitron_train.reporting.charts import Chart, Key, Mark, dots, linear, logarithmic, polyline
from minitron_train.reporting.pictures import Picture

GOAL, LAST = 300_000, 1_000_000  # budgets of the headline figures
ROLES = ("pruned", "student", "cut", "teacher", "ink")  # colours of the starts, in their order
PANEL = (740, 410)  # pixels of a panel of the figure
DASH = "–"


@dataclass(frozen=True, slots=True)
class Figure:
    """One headline figure; None with the reason why it is missing."""

    value: Any
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Results:
    """All rows, with the questions that the report asks."""

    rows: Sequence[Row]

    @property
    def starts(self) -> list[str]:
        """Names of the starts with rows: ModelOpt's cut, ours, then the others by age."""
        found = [row["start"] for row in self.rows if row["start"] != "teacher"]
        return [
            MODELOPT.name,
            OURS.name,
            *dict.fromkeys(name for name in found if name not in (MODELOPT.name, OURS.name)),
        ]

    def best(self, start: str, budget: int, text: str, measure: str = "ce") -> Best | None:
        return best(self.rows, start, budget, text, measure)

    def untrained(self, start: str, text: str, measure: str) -> float | None:
        """The loss of a cut, or of the teacher."""
        found = (row["losses"][text][measure] for row in self.rows if run_of(row) == Run(start))
        return next(found, None)

    def lead(self, start: str, budget: int, text: str) -> Figure:
        """Nats by which a start's cross-entropy is lower than that of ModelOpt's cut, both at their best rates."""
        ours, theirs = (self.best(name, budget, text) for name in (start, MODELOPT.name))
        if ours is None or theirs is None:
            return Figure(None, missing(start if ours is None else MODELOPT.name, budget))
        return Figure(theirs.value - ours.value)

    def tokens_ratio(self, start: str, text: str) -> Figure:
        """How many times fewer tokens a start needs for the loss of ModelOpt's cut after GOAL tokens.

        The budgets' best losses are interpolated over the logarithm of tokens. `reason` names a bound.
        """
        goal = self.best(MODELOPT.name, GOAL, text)
        if goal is None:
            return Figure(None, missing(MODELOPT.name, GOAL))
        points = [found for budget in BUDGETS if (found := self.best(start, budget, text))]
        if not points:
            return Figure(None, missing(start, BUDGETS[0]))
        if points[0].value <= goal.value:
            return Figure(goal.tokens / points[0].tokens, f"{text}: at least; reached at the smallest budget measured")
        for before, after in pairwise(points):
            if after.value <= goal.value:
                share = (before.value - goal.value) / (before.value - after.value)
                tokens = math.exp(math.log(before.tokens) + share * math.log(after.tokens / before.tokens))
                return Figure(goal.tokens / tokens)
        return Figure(None, f"{text}: {start} does not reach the loss within {amount(points[-1].tokens)} tokens")

    def headline(self, start: str) -> dict[str, Figure]:
        """The figures of one start against ModelOpt's cut."""
        ratios = [self.tokens_ratio(start, text) for text in HEADLINE]
        smallest = next((ratio for ratio in ratios if ratio.value is None), None)
        leads = {text: self.lead(start, LAST, text) for text in TEXTS}
        absent = next((lead for lead in leads.values() if lead.value is None), None)
        behind = [text for text, lead in leads.items() if lead.value is not None and lead.value < 0]
        return {
            "tokens_ratio": smallest or min(ratios, key=lambda ratio: ratio.value),
            "lead_own": self.lead(start, GOAL, "own"),
            "lead_wikitext2": self.lead(start, GOAL, "wikitext2"),
            "behind_at_1m": absent or Figure(behind),
        }


def missing(start: str, budget: int) -> str:
    return f"no finished run of {start} at {amount(budget)}"


def as_json(results: Results) -> dict[str, Any]:
    """The headline figures of ours, those of every start, and the best rates. A missing figure is null and has a reason."""
    starts = {}
    for name in results.starts[1:]:
        figures = results.headline(name)
        reasons = {key: figure.reason for key, figure in figures.items() if figure.reason}
        starts[name] = {key: figure.value for key, figure in figures.items()} | {"reasons": reasons}
    table = [
        {"start": start, "budget": budget, "text": text, "measure": measure, **asdict(found)}
        for start in results.starts
        for budget in BUDGETS
        for text in TEXTS
        for measure in MEASURES
        if (found := results.best(start, budget, text, measure))
    ]
    return starts[OURS.name] | {"num_rows": len(results.rows), "starts": starts, "best": table}


def markdown(results: Results) -> str:
    """The headline figures and a table for each measure."""
    parts = [f"{len(results.rows)} rows; {', '.join(conditions(results.rows)) or 'no machine'}."]
    header = "| against ModelOpt's cut | tokens ratio | lead own | lead wikitext2 | behind at 1M |"
    lines = [header, "|---|---|---|---|---|"]
    for start in results.starts[1:]:
        lines.append(
            f"| {start} | {' | '.join(headline_cell(figure) for figure in results.headline(start).values())} |"
        )
    parts.append("\n".join(lines))
    parts += [measure_table(results, measure, title) for measure, title in MEASURES.items()]
    parts.append(
        "Each cell: the lowest loss of the first seed's rates (mean over that rate's seeds, ± half their spread), at learning "
        "rate/warm-up. * marks a learning rate at the edge of those tried."
    )
    return "\n\n".join(parts)


def conditions(rows: Sequence[Row]) -> list[str]:
    """The machines and precisions of the rows."""
    return sorted({f"{row['machine']}, {row['precision']}" for row in rows})


def headline_cell(figure: Figure) -> str:
    """One figure as text, with its reason."""
    value = figure.value
    text = f"{value:.3g}" if isinstance(value, float) else DASH if value is None else ", ".join(value) or "none"
    return f"{text} ({figure.reason})" if figure.reason else text


def measure_table(results: Results, measure: str, title: str) -> str:
    """Losses of one measure: a row for each start and budget, a column for each text."""
    lines = [f"| {title} | tokens | {' | '.join(TEXTS)} |", "|---|---|" + "---|" * len(TEXTS)]
    for name in ("teacher", *results.starts):
        cells = [results.untrained(name, text, measure) for text in TEXTS]
        shown = [DASH if value is None else f"{value:.3f}" for value in cells]
        lines.append(f"| {name} | 0 | {' | '.join(shown)} |")
    for budget in BUDGETS:
        for start in results.starts:
            shown = [best_cell(results.best(start, budget, text, measure)) for text in TEXTS]
            lines.append(f"| {start} | {amount(budget)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def best_cell(found: Best | None) -> str:
    """A loss with its rate."""
    if found is None:
        return DASH
    spread = f" ± {found.spread / 2:.3f}" if found.num_seeds > 1 else ""
    return f"{found.value:.3f}{spread} at {found.lr:g}{'*' * found.is_edge}/{found.warmup:g}"


def chart(results: Results, text: str) -> Chart:
    """Cross-entropy over tokens at the best rates, one line for each start."""
    lines = {
        start: [found for budget in BUDGETS if (found := results.best(start, budget, text))] for start in results.starts
    }
    points = [found for line in lines.values() for found in line]
    x = logarithmic([*BUDGETS] if not points else [found.tokens for found in points], amount_label)
    y = linear([found.value for found in points], lambda value: f"{value:.2f}", zero=False)
    marks, keys = [], []
    for i, (start, line) in enumerate(lines.items()):
        role = ROLES[min(i, len(ROLES) - 1)]
        xs, ys = [found.tokens for found in line], [found.value for found in line]
        marks += [Mark(kind="line", role=role, path=polyline(x, y, xs, ys))]
        marks += [Mark(kind="dots", role=role, path=dots(x, y, xs, ys), title=start)]
        keys.append(Key(kind="line", role=role, text=start))
    teacher = results.untrained("teacher", text, "ce")
    caption = f"Cross-entropy on {text}, nats; each point is the best learning rate and warm-up of its budget."
    caption += f" Teacher: {teacher:.3f}." if teacher is not None else ""
    return Chart(
        title=text, caption=caption, x=x, y=y, marks=marks, x_label="training tokens", keys=keys, height_px=270
    )


def amount_label(value: float) -> str:
    return amount(round(value))


def svg(results: Results) -> str:
    """The charts of all texts as one SVG image, two in a row."""
    width, height = PANEL
    rows = math.ceil(len(TEXTS) / 2)
    panels = [
        str(Picture(chart(results, text))).replace("<svg ", f'<svg x="{i % 2 * width}" y="{i // 2 * height}" ', 1)
        for i, text in enumerate(TEXTS)
    ]
    size = f'width="{2 * width}" height="{rows * height}" viewBox="0 0 {2 * width} {rows * height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{"".join(panels)}</svg>\n'
