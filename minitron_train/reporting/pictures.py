"""The report's charts as SVG images with text and colours of their own, for notebooks and papers."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from minitron_train.reporting.charts import VIEW, Chart
from minitron_train.reporting.importance import importance_charts
from minitron_train.reporting.load import load_run
from minitron_train.reporting.template import template

COLOURS = {  # the light ones of templates/style.css
    "ink": "#16191d",
    "muted": "#59616b",
    "kept": "#0b6bb5",
    "cut": "#8d949c",
    "teacher": "#4a5563",
    "pruned": "#c8590c",
    "student": "#0b6bb5",
}
CAPTION_CHARACTERS = 105  # in one line


@dataclass(frozen=True, slots=True)
class Picture:
    """One chart. A notebook shows it; str() is the SVG."""

    chart: Chart

    def __str__(self) -> str:
        lines = textwrap.wrap(self.chart.caption, CAPTION_CHARACTERS)
        return template("picture.jinja").render(c=self.chart, view=VIEW, colours=COLOURS, lines=lines)

    def __repr__(self) -> str:
        return f"Picture: {self.chart.title}. {self.chart.caption}"

    def _repr_svg_(self) -> str:
        return str(self)


def importance_pictures(output_dir: Path | str) -> dict[str, Picture]:
    """Importance and what was kept, by title: one picture for each axis that an output folder holds scores of.

    Raises:
        UserError: there is no such folder, or a file in it is damaged.
    """
    run = load_run(Path(output_dir))
    teacher = run.models.get("teacher")
    charts = importance_charts(run.axes, teacher.shape.num_query_groups if teacher else None)
    return {chart.title: Picture(chart) for chart in charts}
