"""Requests that share beginnings, laid out so that every shared token is computed once. Pure Python, no model.

Two means, chosen from the token lists alone:
- a tree in one row. HellaSwag: context, ending 1, … ending 4; each ending sees the context and itself. Trees that have
  nothing in common fill a row together, so that there is hardly any padding.
- a group of rows with one cached prefix. MMLU: the few-shot examples of a subject, then its questions.
Requests with the same input (MMLU's answers A, B, C, D) are one path of a tree with four targets.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIN_SHARED = 8  # tokens in common that bring two requests into one tree
MIN_CACHED = 128  # tokens in common that are worth a cached prefix
MIN_FILLED = 7 / 8  # of the longest row of a batch; the rest is padding
MAX_ROW = 384  # tokens of a row that holds several requests: attention costs more in longer rows


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to score: `tokens` without the last are the input, the last `num_targets` are scored."""

    index: int
    tokens: tuple[int, ...]
    num_targets: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.tokens[:-1]


@dataclass(slots=True)
class PackedRow:
    """Trees of inputs, depth first. A token's parent is the token before it in its text, -1 for the first."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)  # place in the row, target token, request index

    @property
    def is_chain(self) -> bool:
        """Whether plain causal attention is right."""
        return self.depths[-1] == len(self.depths) - 1

    def join(self, other: "PackedRow") -> None:
        """Put another row's trees behind this one's."""
        start = len(self.tokens)
        self.tokens.extend(other.tokens)
        self.depths.extend(other.depths)
        self.parents.extend(parent + start if parent >= 0 else -1 for parent in other.parents)
        self.targets.extend((place + start, token, index) for place, token, index in other.targets)


@dataclass(frozen=True, slots=True)
class Unit:
    """Work for one data-parallel rank: a prefix (maybe empty) and batches of rows that follow it."""

    prefix: tuple[int, ...]
    batches: list[list[PackedRow]]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return len(self.prefix) + sum(len(batch) * len(batch[0].tokens) for batch in self.batches)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def families(requests: Iterable[Request]) -> list[list[Request]]:
    """Neighbours in sorted order that share at least MIN_CACHED input tokens."""
    groups: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: r.tokens):
        if groups and common_length(groups[-1][-1].inputs, request.inputs) >= MIN_CACHED:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def cached_length(family: list[Request]) -> int:
    """Tokens of a sorted family that are worth a cached prefix: 0 when one row holds it all, or when it shares few."""
    if len(grow_trees(family, 0)) == 1:
        return 0
    shared = common_length(family[0].inputs, family[-1].inputs)  # sorted: the first and the last differ earliest
    shared = min(shared, *(len(r.inputs) - r.num_targets for r in family))  # no target is read off the prefix
    return shared if shared >= MIN_CACHED else 0


def grow_trees(requests: list[Request], num_prefix: int) -> list[PackedRow]:
    """Trees of sorted requests; the first `num_prefix` tokens are left out, since they are cached.

    A tree has at most MAX_ROW tokens, unless a single request is longer.
    """
    trees: list[PackedRow] = []
    path: list[int] = []  # places in the tree of the last request's tokens
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
    """Trees into rows of at most MAX_ROW tokens: the largest first, each into the row that it fills best."""
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
    """Rows of like length together, the longest first, at most `batch_tokens` with padding (but at least one row)."""
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
    """All the work, largest pieces first."""
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
    """This rank's part: each unit goes to the rank with the least work so far."""
    loads = [0] * size
    mine = []
    for unit in units:
        taker = min(range(size), key=loads.__getitem__)
        loads[taker] += unit.num_tokens
        if taker == rank:
            mine.append(unit)
    return mine
