"""One source as an endless sequence of packed windows, whose position is a few numbers."""

# S sequence length in tokens
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from minitron_train.data.chat import COUNTED, PADDING
from minitron_train.data.units import Unit, permutation
from minitron_train.data.workers import Pending
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError

REPORTED_PASSES = 4  # each of the first passes is reported, then every doubling
NOT_WHOLE = {  # number in a Unit -> what is reported
    "num_blank": "documents of a unit are null, empty or blank; such documents are left out",
    "num_long": "conversations of a unit have more than {seq_length:,} tokens; those are {too_long}",
    "num_silent": "conversations of a unit have no token that the loss counts; such conversations are left out",
}
CUT_OR_DROPPED = {False: "cut (too_long)", True: "dropped (too_long)"}  # Unit.drops_long -> what is reported
PAD = -1  # document number of padding between conversations
Position = dict  # {"epoch", "unit"} of a unit, and "rows" (the state of `datasets`) for a hub source


@dataclass(frozen=True, slots=True)
class Window:
    """S + 1 consecutive tokens of one unit."""

    tokens: np.ndarray  # [S + 1] int32
    documents: np.ndarray  # [S + 1] int32: 0 for the first document in the window, 1 for the next, …; PAD for padding
    counts: np.ndarray | None = None  # [S + 1] bool: tokens that count as labels; None: all (text)


def num_windows(unit: Unit, seq_length: int) -> int:
    """Windows of a unit. Each begins with the last token of the previous one; a rest of less than S tokens is dropped.

    Each epoch shuffles the documents into new units, so other tokens are dropped each time.
    """
    return max(0, len(unit.tokens) - 1) // seq_length


def cut(unit: Unit, index: int, seq_length: int) -> Window:
    """One window of a unit."""
    start = index * seq_length
    tokens = unit.tokens[start : start + seq_length + 1]
    first, last = np.searchsorted(unit.ends, [start, start + seq_length], side="right")
    begins = np.zeros(seq_length + 1, np.int32)
    begins[unit.ends[first:last] - start] = 1
    documents = np.cumsum(begins, dtype=np.int32)
    if unit.counts is None:
        return Window(tokens, documents)
    counts = unit.counts[start : start + seq_length + 1]
    documents[counts == PADDING] = PAD
    return Window(tokens, documents, counts == COUNTED)


class Packer:
    """A source's windows, shuffled inside each unit, so that neighbours in a batch come from different documents.

    The state is the unit and the number of windows taken from it. Resuming tokenises that one unit again.
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
        self.units = units  # starting at the state's position
        self.seq_length = seq_length
        self.seed = seed
        self.ahead = ahead  # units requested in advance
        self.num_units = num_units  # units per pass; known only once the source is open
        self.waiting: deque[tuple[Position, Pending]] = deque()
        self.unit: Unit | None = None
        self.order = np.empty(0, np.int64)  # permutation of the unit's windows
        self.position: Position | None = state["position"] if state else None  # the unit's position
        self.taken = state["taken"] if state else 0  # windows of the unit
        self.before = state["before"] if state else 0  # windows of the epoch's earlier units
        self.pass_windows: int | None = state["pass_windows"] if state else None  # windows of the last complete epoch
        self.reported: set[str] = set()  # kinds of NOT_WHOLE
        self.longest = 0  # tokens of the longest unit in this epoch

    def state_dict(self) -> dict | None:
        """Position of the next window; None before the first."""
        if self.position is None:
            return None
        counts = {"taken": self.taken, "before": self.before, "pass_windows": self.pass_windows}
        return {"position": self.position, **counts}

    def passes(self) -> dict[str, float | None]:
        """How often the source was read (`passes`), and the tokens of its last complete pass; None where unknown."""
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
        """The next window; an unwanted one is skipped without reading its tokens."""
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
        """Request the first unit, so that several sources are tokenised concurrently."""
        if self.unit is None and not self.waiting:
            self.waiting.append(next(self.units))

    def fetch(self) -> None:
        """Wait for the next unit, and request the ones after it."""
        if not self.waiting:
            self.waiting.append(next(self.units))
        previous, resumes = self.position, self.unit is None
        self.position, pending = self.waiting.popleft()
        if previous and not resumes:
            self.before += len(self.order)
            if self.position["epoch"] > previous["epoch"]:
                self.begin_pass(self.position["epoch"] + 1)
        self.unit, self.taken = pending.result(), 0
        self.report(self.unit)
        while len(self.waiting) < self.ahead:
            self.waiting.append(next(self.units))
        self.order = permutation(
            num_windows(self.unit, self.seq_length), self.seed, self.position["epoch"], self.position["unit"]
        )
        self.longest = max(self.longest, len(self.unit.tokens))

    def report(self, unit: Unit) -> None:
        """Report once each kind of document that is not read whole, with their number in the first such unit."""
        values = {"seq_length": self.seq_length, "too_long": CUT_OR_DROPPED[unit.drops_long]}
        for name, message in NOT_WHOLE.items():
            if (count := getattr(unit, name)) and name not in self.reported:
                self.reported.add(name)
                say(f"data: {self.name}: {count:,} of {unit.num_read:,} {message.format_map(values)}")

    def begin_pass(self, number: int) -> None:
        """Record the windows of the pass that has ended, and report the next pass (see REPORTED_PASSES).

        Raises:
            UserError: the pass had no window, so the next one would have none either.
        """
        if not self.before:
            raise UserError(
                f"data: source {self.name} has {self.longest} tokens, fewer than one sequence of {self.seq_length} "
                "and its label; give more text or a smaller seq_length"
            )
        self.pass_windows, self.before, self.longest = self.before, 0, 0
        if number <= REPORTED_PASSES or number.bit_count() == 1:
            say(f"data: {self.name}: pass {number} begins; a pass has {self.pass_windows * self.seq_length:,} tokens")
