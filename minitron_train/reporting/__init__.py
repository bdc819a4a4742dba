"""The report: a self-contained HTML page about a run, with sizes, importance, training, evaluation, provenance."""

from pathlib import Path

from minitron_train.reporting import charts, evaluation, page
from minitron_train.reporting.curves import health_charts, loss_charts
from minitron_train.reporting.family import family_table, write_family_report
from minitron_train.reporting.importance import importance_charts
from minitron_train.reporting.load import MODELS, Run, load_run
from minitron_train.reporting.speed import conditions, labels, speed_rows
from minitron_train.reporting.summary import notes, summary_table
from minitron_train.reporting.template import template
from minitron_train.runtime.files import atomic_write_text


def write_report(output_dir: Path, target: Path | None = None) -> Path:
    """Write the report page about an output folder. One line stands for each stage that has not run.

    The page needs no network and no scripts. It follows the reader's light or dark setting and can be printed.

    Args:
        target: the file to write; default OUTPUT_DIR/report.html.

    Returns:
        The written file.

    Raises:
        UserError: the folder does not exist, a file in it is damaged, or the page cannot be written.
    """
    target = target or output_dir / "report.html"
    atomic_write_text(target, render(load_run(output_dir)))
    return target


def render(run: Run) -> str:
    """Return the page as HTML text."""
    teacher = run.models.get("teacher")
    return template("page.jinja").render(
        run=run,
        page=page,
        evaluation=evaluation,
        score_charts=evaluation.score_charts(run),
        labels=MODELS,
        models=run.labels,
        view=charts.VIEW,
        importance=importance_charts(run.axes, teacher.shape.num_query_groups if teacher else None),
        losses={
            name: loss_charts(columns, run.evals if name == "train" else {}) for name, columns in run.metrics.items()
        },
        health={name: health_charts(columns) for name, columns in run.metrics.items()},
        speed=speed_rows(run),
        timed=labels(run.speed) if run.speed else [],
        conditions=conditions(run),
        missing=page.missing(run),
        notes=notes(run),
    )


__all__ = ["family_table", "render", "summary_table", "write_family_report", "write_report"]
