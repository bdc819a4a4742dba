"""Requests that share beginnings, laid out so that every shared token is computed once. Pure Python, no model.

Two means, chosen from the token lists alone:
- a row is a trie in one sequence. HellaSwag: context, ending 1, … ending 4; each ending sees the context and itself.
- a group of rows has one cached prefix. MMLU: the few-shot examples of a subject, then its questions.
Requests with the same input (MMLU's answers A, B, C, D) are one path of the trie with four targets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIN_SHARED = 8  # tokens in common that bring two requests into one row
MIN_CACHED = 128  # tokens in common that are worth a cached prefix
MAX_ROW = 512  # tokens of a row that holds several requests


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
class Row:
    """A trie of inputs, depth first. A token's parent is the token before it in its text, -1 for the first."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)  # place in the row, target token, request index

    @property
    def is_chain(self) -> bool:
        """Whether plain causal attention is right."""
        return self.depths[-1] == len(self.depths) - 1


@dataclass(frozen=True, slots=True)
class Unit:
    """Work for one data-parallel rank: a prefix (maybe empty) and batches of rows that follow it."""

    prefix: tuple[int, ...]
    batches: list[list[Row]]

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


def shared_prefix(family: list[Request]) -> int:
    """Tokens that a family shares and that no target is read off."""
    shared = common_length(family[0].inputs, family[-1].inputs)  # sorted: the first and the last differ earliest
    return min(shared, *(len(r.inputs) - r.num_targets for r in family))


def pack_rows(family: list[Request], num_prefix: int) -> list[Row]:
    """Rows of a sorted family; the first `num_prefix` tokens are left out, since they are cached."""
    rows: list[Row] = []
    path: list[int] = []  # places in the row of the last request's tokens
    last: tuple[int, ...] = ()
    for request in family:
        inputs = request.inputs[num_prefix:]
        shared = common_length(last, inputs)
        fits = shared == len(inputs) or (rows and len(rows[-1].tokens) + len(inputs) - shared <= MAX_ROW)
        if shared < min(MIN_SHARED, len(inputs)) or not fits:
            rows.append(Row())
            path, shared = [], 0
        row = rows[-1]
        del path[shared:]
        for token in inputs[shared:]:
            row.parents.append(path[-1] if path else -1)
            row.depths.append(len(path))
            path.append(len(row.tokens))
            row.tokens.append(token)
        last = inputs
        places = path[len(path) - request.num_targets :]
        targets = request.tokens[len(request.tokens) - request.num_targets :]
        row.targets.extend((place, token, request.index) for place, token in zip(places, targets, strict=True))
    return rows


def make_batches(rows: list[Row], batch_tokens: int) -> list[list[Row]]:
    """Rows of like length together, the longest first, at most `batch_tokens` with padding (but at least one row)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: -len(r.tokens)):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def plan(requests: Iterable[Request], batch_tokens: int) -> list[Unit]:
    """All the work, largest pieces first."""
    units: list[Unit] = []
    loose: list[Row] = []
    for family in families(requests):
        rows = pack_rows(family, 0)
        num_prefix = shared_prefix(family) if len(rows) > 1 or len(rows[0].tokens) > MAX_ROW else 0
        distinct = len({r.inputs for r in family})
        if num_prefix < MIN_CACHED or distinct == 1:
            loose.extend(rows)
        else:
            batches = make_batches(pack_rows(family, num_prefix), batch_tokens)
            units.append(Unit(family[0].tokens[:num_prefix], batches))
    units.extend(Unit((), [batch]) for batch in make_batches(loose, batch_tokens))
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
