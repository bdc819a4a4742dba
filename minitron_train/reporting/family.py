"""The page and the table of a model family: every member with its origins, its sizes and its results."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_train.reporting.load import Run, load_run
from minitron_train.reporting.summary import aligned, notes, perplexity_of, score_of, size_of, task_name, tasks_of
from minitron_train.reporting.template import template
from minitron_train.runtime import numbers
from minitron_train.runtime.files import atomic_write_text, byte_size

Origins = Mapping[str, tuple[str, str]]  # member -> the model that is pruned, the model that teaches
TITLES = ("", "pruned from", "taught by", "parameters", "bytes", "tokens", "pruned", "perplexity")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model: its name, its cells under `TITLES` and the tasks, and whether it has a page and a card of its own."""

    name: str
    cells: list[str]
    has_page: bool = False
    has_card: bool = False


def write_family_report(folder: Path, name: str, origins: Origins) -> Path:
    """Write the index page of a family. A member that has not been made has a row without figures.

    Raises:
        UserError: a file of a member is damaged, or the page cannot be written.
    """
    runs = read_runs(folder, origins)
    lines = [f"{member}: {line}" for member, run in runs.items() for line in notes(run)]
    page = template("family.jinja").render(
        name=name, titles=[*TITLES[1:], *tasks(runs)], rows=rows(folder, runs, origins), notes=lines
    )
    atomic_write_text(folder / "report.html", page)
    return folder / "report.html"


def family_table(folder: Path, origins: Origins) -> str:
    """Format origins, sizes, tokens, perplexity and task scores of the teacher and of every member as an aligned table.

    Raises:
        UserError: a file of a member is damaged.
    """
    runs = read_runs(folder, origins)
    table = [[*TITLES, *tasks(runs)], *([row.name, *row.cells] for row in rows(folder, runs, origins))]
    return "\n".join(aligned(table))


def read_runs(folder: Path, origins: Origins) -> dict[str, Run]:
    """Return the output folders of the members that have been begun."""
    return {name: load_run(folder / name) for name in origins if (folder / name).is_dir()}


def tasks(runs: Mapping[str, Run]) -> list[str]:
    """Return the names of all evaluated tasks."""
    return [task_name(task) for task in task_keys(runs)]


def task_keys(runs: Mapping[str, Run]) -> list[str]:
    """Return lm-eval's names of all evaluated tasks."""
    return list(dict.fromkeys(task for run in runs.values() for task in tasks_of(run)))


def rows(folder: Path, runs: Mapping[str, Run], origins: Origins) -> list[Row]:
    """Return the teacher's row, from the first member that it taught, and a row for each member."""
    taught = [runs[name] for name, (_, teacher) in origins.items() if teacher == "teacher" and name in runs]
    found = [Row(name="teacher", cells=["–", "–", *figures(taught[0], "teacher", task_keys(runs))])] if taught else []
    for name, (source, teacher) in origins.items():
        run = runs.get(name)
        results = figures(run, "student", task_keys(runs)) if run else ["–"] * (len(TITLES) - 3 + len(task_keys(runs)))
        files = (folder / name / "report.html", folder / name / "student" / "README.md")
        page, card = (file.exists() for file in files)
        found.append(Row(name=name, cells=[source, teacher, *results], has_page=page, has_card=card))
    return found


def figures(run: Run, label: str, names: list[str]) -> list[str]:
    """Return parameters, bytes, tokens, the perplexities after pruning and after training, and the scores of the tasks."""
    parameters, weight_bytes = size_of(run, label)
    tokens = run.metrics.get("train", {}).get("tokens") if label == "student" else None
    return [
        "–" if parameters is None else numbers.count(parameters),
        "–" if weight_bytes is None else byte_size(weight_bytes),
        "–" if tokens is None else numbers.count(int(tokens[-1])),
        numbers.perplexity(perplexity_of(run, "pruned")) if label == "student" else "–",
        numbers.perplexity(perplexity_of(run, label)),
        *(score_of(run, label, task).text for task in names),
    ]
