"""What benchmarks/quality/pruning_race.py runs: starts x budgets x learning rates x warm-ups x seeds, and what is left.

The budgets up to 300 k tokens have the whole grid. 1 M takes the rates that were best at 300 k. At 300 k and at 1 M the best
rates have a second seed. So the plan depends on the rows that exist, and it grows when a grid is complete.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

from pruning_race_rows import FIRST_SEED, HEADLINE, SECOND_SEED, Row, Run, amount, best, run_of

from minitron_train.runtime.errors import UserError

LRS = (1e-4, 2e-4, 4e-4, 8e-4)  # peak learning rates
WARMUPS = (0.1, 0.3)  # shares of the steps
BUDGETS = (50_000, 100_000, 300_000, 1_000_000)  # tokens
TAKES_BEST_OF = {1_000_000: 300_000}  # budget -> the budget whose best rates it takes
TWO_SEEDS = (300_000, 1_000_000)  # budgets whose best rates have a second seed
TRAINING = ("train", "distill")  # sections of settings that change the training and not the cut
RESERVED = {"train.num_tokens", "train.lr", "train.min_lr", "train.warmup_steps", "seed"}  # the race sets these itself
UNKNOWN_SECONDS = {
    "token": 0.013,
    "untrained": 350.0,
}  # CPU seconds of a busy AMD EPYC in bf16, for a plan without rows

Rate = tuple[float, float]  # learning rate, warm-up


@dataclass(frozen=True, slots=True)
class Start:
    """A student before training: keys of the command line that differ from the defaults, and their values."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(RESERVED & self.settings.keys()):
            raise UserError(f"--start {self.name}: {', '.join(taken)} is set by the race; leave it out")

    @property
    def cut(self) -> dict[str, Any]:
        """Settings of `prune`."""
        return {key: value for key, value in self.settings.items() if key.split(".")[0] not in TRAINING}

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the training."""
        return {key: value for key, value in self.settings.items() if key not in self.cut}


MODELOPT, OURS = Start("modelopt", {"prune": "modelopt"}), Start("ours", {"prune": "default"})


@dataclass(frozen=True, slots=True)
class Grid:
    """The starts, and the rates of each budget. Rates that the user gives replace the grid and the best ones."""

    starts: Sequence[Start] = (MODELOPT, OURS)
    budgets: Sequence[int] = BUDGETS
    lrs: Sequence[float] = ()
    warmups: Sequence[float] = ()

    def rates(self, rows: Sequence[Row], start: str, budget: int) -> list[Rate]:
        """The rates of one budget; empty if they depend on runs that are not finished."""
        given = self.lrs or self.warmups
        if budget in TAKES_BEST_OF and not given:
            return self.best_rates(rows, start, TAKES_BEST_OF[budget])
        return list(product(self.lrs or LRS, self.warmups or WARMUPS))

    def best_rates(self, rows: Sequence[Row], start: str, budget: int) -> list[Rate]:
        """The best rates for the headline's texts; empty until all rates of the budget are finished."""
        rates, done = self.rates(rows, start, budget), {run_of(row) for row in rows}
        if not rates or any(Run(start, budget, *rate, FIRST_SEED) not in done for rate in rates):
            return []
        found = [best(rows, start, budget, text) for text in HEADLINE]
        return sorted({(one.lr, one.warmup) for one in found if one})

    def runs(self, rows: Sequence[Row]) -> Iterator[Run]:
        """All runs that are known to be needed, finished or not, in the order of their work."""
        yield from (Run(name) for name in ("teacher", *(start.name for start in self.starts)))
        for budget in self.budgets:
            for start in self.starts:
                yield from (Run(start.name, budget, *rate, FIRST_SEED) for rate in self.rates(rows, start.name, budget))
            for start in self.starts if budget in TWO_SEEDS else ():
                rates = self.best_rates(rows, start.name, budget)
                yield from (Run(start.name, budget, *rate, SECOND_SEED) for rate in rates)

    def left(self, rows: Sequence[Row], only: str = "") -> list[Run]:
        """The runs without a row whose name contains `only`."""
        done = {run_of(row) for row in rows}
        return [run for run in self.runs(rows) if run not in done and only in run.name]

    def undecided(self, rows: Sequence[Row]) -> list[str]:
        """What later runs wait for, as text."""
        found = []
        for budget, start in product(self.budgets, self.starts):
            before = TAKES_BEST_OF.get(budget)
            if before and not self.rates(rows, start.name, budget):
                found.append(
                    f"{start.name} {amount(budget)}: takes the best rates of {amount(before)}, not all finished"
                )
            if budget in TWO_SEEDS and not self.best_rates(rows, start.name, budget):
                found.append(f"{start.name} {amount(budget)}: a second seed for the best rates, when all are finished")
        return found


def minutes(run: Run, rows: Sequence[Row]) -> float:
    """Estimated minutes of a run, by the finished ones."""
    if run.budget:
        measured = [row["seconds"] / row["tokens"] for row in rows if row["tokens"] and not row["resumed_at_step"]]
        return run.budget * (median(measured) if measured else UNKNOWN_SECONDS["token"]) / 60
    measured = [row["seconds"] for row in rows if not row["tokens"]]
    return (median(measured) if measured else UNKNOWN_SECONDS["untrained"]) / 60


def plan_lines(grid: Grid, rows: Sequence[Row], only: str = "") -> list[str]:
    """The runs that are left, with estimated minutes, as text."""
    left = grid.left(rows, only)
    times = [minutes(run, rows) for run in left]
    lines = [f"{time:8.1f} min  {run.name}" for run, time in zip(left, times, strict=True)]
    return [*lines, f"{sum(times):8.1f} min  {len(left)} runs left, {len(rows)} rows kept", *grid.undecided(rows)]
