"""Choose the source of each sequence, so that every prefix of the stream has the weights' shares; two phases."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Blend:
    """Draws the source with the largest deficit: after n sequences of a phase, source i has given n * weight_i of them,
    to within about one.

    Nothing is random, so every prefix has the right shares. The late phase begins at sequence `late_start`, with new
    counts.
    """

    weights: Sequence[Sequence[float]]  # [sources][2]: shares in the first and in the late phase, any scale
    late_start: int | None  # sequences; None: no late phase
    num_sequences: int = 0
    counts: list[int] = field(default_factory=list)  # sequences per source in the current phase

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * len(self.weights)

    def draw(self) -> int:
        """Index of the next sequence's source."""
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
        return {"num_sequences": self.num_sequences, "counts": list(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.num_sequences, self.counts = state["num_sequences"], list(state["counts"])
