"""Pack requests that share a prefix so that each shared token is computed once. Pure Python, no model.

The token lists alone decide between two layouts:
- A tree in one row. HellaSwag: context, ending 1, … ending 4; each ending attends to the context and itself. Unrelated
  trees share a row, so that little padding is needed.
- Several rows after one cached prefix. MMLU: the few-shot examples of a subject, then its questions.
Requests with the same input (MMLU's answers A, B, C, D) are one path of a tree with four targets.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIN_SHARED = 8  # common tokens from which two requests share a tree
MIN_CACHED = 128  # common tokens from which a prefix is cached
MIN_FILLED = 7 / 8  # minimum length of a row, as a fraction of its batch's longest row; the rest is padding
MAX_ROW = 384  # maximum tokens of a row with several requests: attention costs more in longer rows


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to score. The input is `tokens` without the last one; the last `num_targets` tokens are scored."""

    index: int
    tokens: tuple[int, ...]
    num_targets: int

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.tokens[:-1]


@dataclass(slots=True)
class PackedRow:
    """Trees of inputs in depth-first order. A token's parent is the previous token of its text, or -1 for the first."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)  # place in the row, target token, request index

    @property
    def is_chain(self) -> bool:
        """Whether the row is a single sequence, so that plain causal attention is correct."""
        return self.depths[-1] == len(self.depths) - 1

    def join(self, other: "PackedRow") -> None:
        """Append another row's trees."""
        start = len(self.tokens)
        self.tokens.extend(other.tokens)
        self.depths.extend(other.depths)
        self.parents.extend(parent + start if parent >= 0 else -1 for parent in other.parents)
        self.targets.extend((place + start, token, index) for place, token, index in other.targets)


@dataclass(frozen=True, slots=True)
class Unit:
    """Work for one data-parallel rank: a prefix, which may be empty, and the batches of rows that follow it."""

    prefix: tuple[int, ...]
    batches: list[list[PackedRow]]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model processes, including padding."""
        return len(self.prefix) + sum(len(batch) * len(batch[0].tokens) for batch in self.batches)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def families(requests: Iterable[Request]) -> list[list[Request]]:
    """Group requests whose neighbours in sorted order share at least MIN_CACHED input tokens."""
    groups: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: r.tokens):
        if groups and common_length(groups[-1][-1].inputs, request.inputs) >= MIN_CACHED:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def cached_length(family: list[Request]) -> int:
    """Return how many tokens of a sorted family to cache: 0 if one row holds the whole family, or if it shares few tokens."""
    if len(grow_trees(family, 0)) == 1:
        return 0
    shared = common_length(family[0].inputs, family[-1].inputs)  # the first and last of a sorted family share the least
    shared = min(shared, *(len(r.inputs) - r.num_targets for r in family))  # the prefix predicts no target
    return shared if shared >= MIN_CACHED else 0


def grow_trees(requests: list[Request], num_prefix: int) -> list[PackedRow]:
    """Build trees from sorted requests, without the first `num_prefix` tokens, which are cached.

    A tree has at most MAX_ROW tokens, unless a single request is longer.
    """
    trees: list[PackedRow] = []
    path: list[int] = []  # positions in the tree of the last request's tokens
    last: tuple[int, ...] = ()
    for request in requests:
        inputs = request.inputs[num_prefix:]
        shared = common_length(last, inputs)
        fits = shared == len(inputs) or (trees and len(trees[-1].tokens) + len(inputs) - shared <= MAX_ROW)
        if not trees or shared < min(MIN_SHARED, len(inputs)) or not fits:
            trees.append(PackedRow())
            path, shared = [], 0
        tree = trees[-1]
        del path[shared:]
        for token in inputs[shared:]:
            tree.parents.append(path[-1] if path else -1)
            tree.depths.append(len(path))
            path.append(len(tree.tokens))
            tree.tokens.append(token)
        last = inputs
        places = path[len(path) - request.num_targets :]
        targets = request.tokens[len(request.tokens) - request.num_targets :]
        tree.targets.extend((place, token, request.index) for place, token in zip(places, targets, strict=True))
    return trees


def fill_rows(trees: list[PackedRow]) -> list[PackedRow]:
    """Pack trees into rows of at most MAX_ROW tokens (best fit decreasing)."""
    rows: list[PackedRow] = []
    by_room: dict[int, list[PackedRow]] = defaultdict(list)
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        size = len(tree.tokens)
        room = next((room for room in range(size, MAX_ROW) if by_room[room]), None)
        if room is None:
            row = PackedRow()
            rows.append(row)
        else:
            row = by_room[room].pop()
        row.join(tree)
        by_room[MAX_ROW - len(row.tokens)].append(row)
    return rows


def make_batches(rows: list[PackedRow], batch_tokens: int) -> list[list[PackedRow]]:
    """Batch rows of similar length, longest first. A batch has at most `batch_tokens` tokens with padding, or one row."""
    batches: list[list[PackedRow]] = []
    for row in sorted(rows, key=lambda r: -len(r.tokens)):
        longest = len(batches[-1][0].tokens) if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= batch_tokens
        if fits and len(row.tokens) >= MIN_FILLED * longest:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def plan(requests: Iterable[Request], batch_tokens: int) -> list[Unit]:
    """Return all units of work, largest first."""
    units: list[Unit] = []
    loose: list[Request] = []
    for family in families(requests):
        num_prefix = cached_length(family)
        if num_prefix == 0:
            loose.extend(family)
        else:
            rows = fill_rows(grow_trees(family, num_prefix))
            units.append(Unit(family[0].tokens[:num_prefix], make_batches(rows, batch_tokens)))
    units.extend(Unit((), [batch]) for batch in make_batches(fill_rows(grow_trees(loose, 0)), batch_tokens))
    return sorted(units, key=lambda unit: -unit.num_tokens)


def share(units: list[Unit], rank: int, size: int) -> list[Unit]:
    """Return this rank's units. Each unit goes to the rank with the least work so far."""
    loads = [0] * size
    mine = []
    for unit in units:
        taker = min(range(size), key=loads.__getitem__)
        loads[taker] += unit.num_tokens
        if taker == rank:
            mine.append(unit)
    return mine
