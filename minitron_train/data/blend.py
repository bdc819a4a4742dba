"""Which source the next sequence comes from: weights kept at every moment, in two phases."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Blend:
    """Draws sources by largest deficit: after n sequences of a phase, source i had n * weight_i of them, give or take
    about one.

    Nothing is random here, so any prefix has the right shares. The late phase begins with the first sequence at or
    after `late_start` and counts anew.
    """

    weights: Sequence[Sequence[float]]  # [sources][2]: shares in the first and in the late phase, any scale
    late_start: int | None  # sequences; None: no late phase
    num_sequences: int = 0
    counts: list[int] = field(default_factory=list)  # of the current phase

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * len(self.weights)

    def draw(self) -> int:
        """Index of the source that gives the next sequence."""
        late = self.late_start is not None and self.num_sequences >= self.late_start
        if self.num_sequences == self.late_start:
            self.counts = [0] * len(self.weights)
        shares = [weight[late] for weight in self.weights]
        total, drawn = sum(shares), sum(self.counts) + 1
        deficits = [
            drawn * share / total - count if share else -1e9 for share, count in zip(shares, self.counts, strict=True)
        ]
        source = max(range(len(shares)), key=deficits.__getitem__)
        self.counts[source] += 1
        self.num_sequences += 1
        return source

    def state_dict(self) -> dict:
        """Two small things."""
        return {"num_sequences": self.num_sequences, "counts": list(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.num_sequences, self.counts = state["num_sequences"], list(state["counts"])
