"""One source as an endless sequence of packed windows, with a position of a few numbers."""

# S sequence length in tokens
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minitron_train.data.units import Unit
from minitron_train.data.workers import Pending
from minitron_train.errors import UserError

Position = dict  # {"epoch", "unit"} of a unit, and "rows" (the state of `datasets`) for a hub source


@dataclass(frozen=True, slots=True)
class Window:
    """S + 1 consecutive tokens of one source."""

    tokens: np.ndarray  # [S + 1] int32
    documents: np.ndarray  # [S + 1] int32: 0 for the first document in the window, 1 for the next, …


class Packer:
    """Cuts a source's units into windows of S + 1 tokens, each beginning with the last token of the one before.

    So every token but the source's very first is a label exactly once. Windows run on across units and epochs.
    """

    def __init__(
        self,
        name: str,
        units: Iterator[tuple[Position, Pending]],
        seq_length: int,
        ahead: int,
        state: dict | None = None,
    ) -> None:
        self.name = name
        self.units = units  # from the state's position on
        self.state = state  # in force until the first unit is there
        self.seq_length = seq_length
        self.ahead = ahead  # units in the making beyond the one in use
        self.waiting: deque[tuple[Position, Pending]] = deque()
        self.ready: deque[tuple[Position, Unit]] = deque()
        self.offset = state["offset"] if state else 0  # of the next window in the first ready unit, tokens
        self.epoch_tokens: int | None = None  # of the epoch so far, where its beginning was seen

    def state_dict(self) -> dict | None:
        """Where the next window begins; None before the first."""
        return {"position": self.ready[0][0], "offset": self.offset} if self.ready else self.state

    def next_window(self, wanted: bool = True) -> Window | None:
        """The next window; None at the end of a source that ends, and for one that is not wanted: it is not read."""
        if not self.fill():
            return None
        window = self.cut() if wanted else None
        self.offset += self.seq_length
        while self.offset >= len(self.ready[0][1].tokens):
            self.offset -= len(self.ready.popleft()[1].tokens)
        return window

    def fill(self) -> bool:
        """Have a whole window ready; False where the source ends before."""
        missing = self.seq_length + 1 + self.offset - sum(len(unit.tokens) for _, unit in self.ready)
        while missing > 0:
            if not self.fetch():
                return False
            missing -= len(self.ready[-1][1].tokens)
        return True

    def fetch(self) -> bool:
        """Wait for the next unit, keeping the ones after it in the making; False if there is none."""
        while len(self.waiting) <= self.ahead and (item := next(self.units, None)):
            self.waiting.append(item)
        if not self.waiting:
            return False
        position, pending = self.waiting.popleft()
        unit = pending.result()
        if position["unit"] == 0:
            self.refuse_small_epoch()
            self.epoch_tokens = 0
        if self.epoch_tokens is not None:
            self.epoch_tokens += len(unit.tokens)
        self.ready.append((position, unit))
        return True

    def refuse_small_epoch(self) -> None:
        """A corpus that does not fill one window would be packed from copies of itself."""
        if self.epoch_tokens is not None and self.epoch_tokens <= self.seq_length:
            raise UserError(
                f"data: source {self.name} has {self.epoch_tokens} tokens, fewer than one sequence of "
                f"{self.seq_length} and its label; give more text or a smaller seq_length"
            )

    def cut(self) -> Window:
        """Copy S + 1 tokens from the ready units, numbering the documents."""
        length, skip = self.seq_length + 1, self.offset
        tokens, document = [], np.zeros(length, np.int32)
        filled = 0
        for _, unit in self.ready:
            piece = unit.tokens[skip : skip + length - filled]
            inside = unit.ends[(unit.ends > skip) & (unit.ends <= skip + len(piece))] - skip + filled
            tokens.append(piece)
            document[inside[inside < length]] += 1
            filled += len(piece)
            skip = max(0, skip - len(unit.tokens))
        assert filled == length
        return Window(np.concatenate(tokens), np.cumsum(document, dtype=np.int32))
