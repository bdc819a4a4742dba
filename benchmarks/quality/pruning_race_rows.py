"""The finished runs of benchmarks/quality/pruning_race.py: one JSON line each, and the best of them.

A row belongs to one `Run`. Its `losses` hold cross-entropy (`ce`) and KL to the teacher (`kl`), in nats, for each text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_file

TEXTS = ("own", "wikitext2", "documentation", "conversations")
HEADLINE = ("own", "wikitext2")  # the texts of the headline figures
MEASURES = {"ce": "cross-entropy", "kl": "KL to the teacher"}
FIRST_SEED, SECOND_SEED = 1234, 4321
SHARED = ("target", "texts", "batch")  # fields that must be equal in all rows
OWN_SETTINGS = ("prune", "calibration", "distill", "train")  # sections that must be equal in all rows of one start
RATES = {"train.num_tokens", "train.lr", "train.min_lr", "train.warmup_steps"}
VARIES = RATES | {"train.precision", "calibration.precision"}  # settings of these sections that may differ
UNITS = ((1_000_000, "M"), (1_000, "k"))

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """One training. Without tokens it is only measured: a cut, or the teacher."""

    start: str
    budget: int = 0  # tokens; the run rounds them up to whole steps
    lr: float = 0.0  # peak learning rate
    warmup: float = 0.0  # warm-up as a share of the steps
    seed: int = 0

    @property
    def name(self) -> str:
        """What --only compares."""
        if not self.budget:
            return f"{self.start} untrained"
        rate = f"lr {self.lr:g} warm-up {self.warmup:.0%}"
        return f"{self.start} {amount(self.budget)} {rate} seed {self.seed}"


def amount(tokens: int) -> str:
    """Tokens as text, such as 50k."""
    return next((f"{tokens / size:g}{unit}" for size, unit in UNITS if tokens >= size), str(tokens))


def run_of(row: Row) -> Run:
    return Run(**{field.name: row[field.name] for field in fields(Run)})


@dataclass(frozen=True, slots=True)
class Best:
    """The best run of a start: the rate with the lowest loss of the first seed, and the mean over that rate's seeds."""

    tokens: int  # tokens that the run was trained on
    value: float
    lr: float
    warmup: float
    num_seeds: int
    spread: float  # largest minus smallest value of the seeds
    is_edge: bool  # whether a rate beyond the tried ones may be better


def best(rows: Iterable[Row], start: str, budget: int, text: str, measure: str = "ce") -> Best | None:
    """The best rate of a start for one budget and text, or None without a finished run.

    Only the first seed selects, because every rate has it. A tie goes to the lower learning rate, then to the shorter warm-up.
    """
    cells: dict[tuple[float, float], dict[int, Row]] = {}
    for row in rows:
        if row["start"] == start and row["budget"] == budget and row["losses"][text][measure] is not None:
            cells.setdefault((row["lr"], row["warmup"]), {})[row["seed"]] = row
    first = {cell: seeds[FIRST_SEED] for cell, seeds in cells.items() if FIRST_SEED in seeds}
    if not first:
        return None
    lr, warmup = chosen = min(first, key=lambda cell: (first[cell]["losses"][text][measure], *cell))
    values = [row["losses"][text][measure] for row in cells[chosen].values()]
    rates = {lr for lr, _ in first}
    return Best(
        tokens=first[chosen]["tokens"],
        value=mean(values),
        lr=lr,
        warmup=warmup,
        num_seeds=len(values),
        spread=max(values) - min(values),
        is_edge=lr in (min(rates), max(rates)),
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """The file of finished runs; every read gives what is on disk."""

    path: Path

    def read(self) -> list[Row]:
        """All rows, oldest first.

        Raises:
            UserError: a line is not JSON, or rows cannot be compared.
        """
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{self.path}: line {number} is not JSON; remove it") from error
        self.check(rows)
        return rows

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse rows of different texts, targets or batches, and rows of one start with different settings."""
        for key in SHARED:
            if len({json.dumps(row[key], sort_keys=True) for row in rows}) > 1:
                raise UserError(
                    f"{self.path}: the rows differ in `{key}`; all must agree; use another file with --rows"
                )
        known: dict[str, Mapping[str, Any]] = {}
        for row in rows:
            settings = own_settings(row)
            if other := different(known.setdefault(row["start"], settings), settings):
                raise UserError(
                    f"{self.path}: rows of {row['start']} differ in {', '.join(other)}; a start has one set of settings; "
                    "give the new ones another name with --start"
                )

    def append(self, row: Row) -> None:
        """Add one row. A kill leaves the old file or the new one. A row that cannot be compared is refused."""
        rows = self.read()
        assert all(run_of(other) != run_of(row) for other in rows), f"{run_of(row).name} has a row"
        self.check([*rows, row])
        with atomic_file(self.path) as scratch:
            scratch.write_text("".join(json.dumps(each) + "\n" for each in [*rows, row]))


def own_settings(row: Row) -> dict[str, Any]:
    """The settings that belong to the row's start, as one flat dict."""
    sections = {section: row["settings"][section] for section in OWN_SETTINGS}
    found = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {key: value for key, value in found.items() if key not in VARIES}


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys that both have with different values. A key that only one has is a later or an earlier setting."""
    return [key for key in one.keys() & other.keys() if one[key] != other[key]]


def make_row(run: Run, **facts: Any) -> Row:
    return asdict(run) | facts
