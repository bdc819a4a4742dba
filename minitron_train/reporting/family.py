"""The page and the table of a model family: every member with its sizes, its origins and its results."""

from collections.abc import Sequence
from pathlib import Path

from minitron_train.reporting.load import Run, load_run
from minitron_train.reporting.summary import aligned, perplexity_of, size_of
from minitron_train.runtime import numbers
from minitron_train.runtime.files import byte_size


def family_table(folder: Path, members: Sequence[str]) -> str:
    """Format parameters, bytes and perplexity of the teacher and of every member that has been made.

    Raises:
        UserError: a file of a member is damaged.
    """
    runs = {name: load_run(folder / name) for name in members if (folder / name).is_dir()}
    table = [["", "parameters", "bytes", "perplexity"]]
    for name, run in runs.items():
        table.append([name, *cells(run, "student")])
    return "\n".join(aligned(table))


def cells(run: Run, label: str) -> list[str]:
    """Return parameters, bytes and perplexity of one model."""
    parameters, weight_bytes = size_of(run, label)
    return [
        "–" if parameters is None else numbers.count(parameters),
        "–" if weight_bytes is None else byte_size(weight_bytes),
        numbers.perplexity(perplexity_of(run, label)),
    ]
