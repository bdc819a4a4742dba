"""One source as an endless sequence of packed windows, with a position of a few numbers."""

# S sequence length in tokens
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from minitron_train.data.units import Unit, permutation
from minitron_train.data.workers import Pending
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError

SAID_PASSES = 4
Position = dict  # {"epoch", "unit"} of a unit, and "rows" (the state of `datasets`) for a hub source


@dataclass(frozen=True, slots=True)
class Window:
    """S + 1 consecutive tokens of one unit."""

    tokens: np.ndarray  # [S + 1] int32
    documents: np.ndarray  # [S + 1] int32: 0 for the first document in the window, 1 for the next, …


def num_windows(unit: Unit, seq_length: int) -> int:
    """Windows of a unit: each begins with the last token of the one before it; the rest, below S tokens, is left out.

    Documents are shuffled into units anew in each epoch, so the rest is another one each time.
    """
    return max(0, len(unit.tokens) - 1) // seq_length


def cut(unit: Unit, index: int, seq_length: int) -> Window:
    """One window of a unit."""
    start = index * seq_length
    tokens = unit.tokens[start : start + seq_length + 1]
    first, last = np.searchsorted(unit.ends, [start, start + seq_length], side="right")
    begins = np.zeros(seq_length + 1, np.int32)
    begins[unit.ends[first:last] - start] = 1
    return Window(tokens, np.cumsum(begins, dtype=np.int32))


class Packer:
    """A source's windows, shuffled inside each unit: neighbours in a batch come from different documents.

    The state is the unit and the number of windows taken from it; going on from it makes that one unit again.
    """

    def __init__(
        self,
        name: str,
        units: Iterator[tuple[Position, Pending]],
        *,
        seq_length: int,
        seed: int,
        ahead: int,
        num_units: Callable[[], int | None],
        state: dict | None = None,
    ) -> None:
        self.name = name
        self.units = units  # from the state's position on
        self.seq_length = seq_length
        self.seed = seed
        self.ahead = ahead  # units in the making beyond the one in use
        self.num_units = num_units  # of a pass; asked when the source is open
        self.waiting: deque[tuple[Position, Pending]] = deque()
        self.unit: Unit | None = None
        self.order = np.empty(0, np.int64)  # of the unit's windows
        self.position: Position | None = state["position"] if state else None  # of the unit
        self.taken = state["taken"] if state else 0  # windows of the unit
        self.before = state["before"] if state else 0  # windows of the epoch's earlier units
        self.pass_windows: int | None = state["pass_windows"] if state else None  # of the last whole epoch
        self.said_blank = False  # that documents have no text
        self.longest = 0  # unit of the epoch so far, tokens

    def state_dict(self) -> dict | None:
        """Where the next window comes from; None before the first."""
        if self.position is None:
            return None
        counts = {"taken": self.taken, "before": self.before, "pass_windows": self.pass_windows}
        return {"position": self.position, **counts}

    def passes(self) -> dict[str, float | None]:
        """How often the source was read (`passes`), and the tokens of its last whole pass; None where that is not known."""
        per_pass = None if self.pass_windows is None else self.pass_windows * self.seq_length
        if self.unit is None or self.position is None:
            return {"passes": None, "tokens_per_pass": per_pass}
        if self.pass_windows:
            part: float | None = min(1.0, (self.before + self.taken) / self.pass_windows)
        else:
            total = self.num_units()
            part = (self.position["unit"] + self.taken / max(1, len(self.order))) / total if total else None
        passes = None if part is None else round(self.position["epoch"] + part, 3)
        return {"passes": passes, "tokens_per_pass": per_pass}

    def next_window(self, wanted: bool = True) -> Window | None:
        """The next window; one that is not wanted is passed over unread."""
        if self.unit is None:
            taken = self.taken
            self.fetch()
            self.taken = taken
        while self.taken >= len(self.order):
            self.fetch()
        self.taken += 1
        assert self.unit
        return cut(self.unit, int(self.order[self.taken - 1]), self.seq_length) if wanted else None

    def start(self) -> None:
        """Have the first unit made, so that several sources do not wait for each other."""
        if self.unit is None and not self.waiting:
            self.waiting.append(next(self.units))

    def fetch(self) -> None:
        """Wait for the next unit, and have the ones after it made."""
        if not self.waiting:
            self.waiting.append(next(self.units))
        previous, resumes = self.position, self.unit is None
        self.position, pending = self.waiting.popleft()
        if previous and not resumes:
            self.before += len(self.order)
            if self.position["epoch"] > previous["epoch"]:
                self.begin_pass(self.position["epoch"] + 1)
        self.unit, self.taken = pending.result(), 0
        self.report_blank(self.unit)
        while len(self.waiting) < self.ahead:
            self.waiting.append(next(self.units))
        self.order = permutation(
            num_windows(self.unit, self.seq_length), self.seed, self.position["epoch"], self.position["unit"]
        )
        self.longest = max(self.longest, len(self.unit.tokens))

    def report_blank(self, unit: Unit) -> None:
        """Say once that documents without text are left out, with their share of the first unit that has any."""
        if unit.num_blank and not self.said_blank:
            self.said_blank = True
            say(
                f"data: {self.name}: {unit.num_blank:,} of {unit.num_read:,} documents of a unit are null, empty or blank; "
                "such documents are left out"
            )

    def begin_pass(self, number: int) -> None:
        """Note the windows of the pass that has ended, and report the next: each of the first, then every doubling.

        Raises:
            UserError: the pass had no window, so that the next one would have none either.
        """
        if not self.before:
            raise UserError(
                f"data: source {self.name} has {self.longest} tokens, fewer than one sequence of {self.seq_length} "
                "and its label; give more text or a smaller seq_length"
            )
        self.pass_windows, self.before, self.longest = self.before, 0, 0
        if number <= SAID_PASSES or number.bit_count() == 1:
            say(f"data: {self.name}: pass {number} begins; a pass has {self.pass_windows * self.seq_length:,} tokens")
