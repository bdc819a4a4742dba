"""Layouts of requests: every target is there once, with the tokens that precede it in its own text."""

import random

import pytest

from minitron_train.evaluation.packing import MAX_ROW, MIN_CACHED, Request, plan, share


def random_requests(kind: str, source: random.Random) -> list[Request]:
    """Requests of the shapes that tasks make."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(source.randrange(50) for _ in range(count))

    texts: list[tuple[tuple[int, ...], int]] = []
    if kind == "endings":  # HellaSwag
        for _ in range(30):
            context = tokens(source.randint(5, 60))
            texts += [(context + tokens(n), n) for n in (source.randint(1, 30) for _ in range(4))]
    elif kind == "examples":  # MMLU: the same input with four answers, behind the same examples
        examples = tokens(300)
        for _ in range(12):
            question = examples + tokens(source.randint(20, 90))
            texts += [((*question, answer), 1) for answer in range(4)]
    elif kind == "windows":  # rolling log-likelihood: nothing in common, all tokens but one scored
        texts = [(tokens(n), n - 1) for n in (2, 17, 900, MAX_ROW, MAX_ROW + 1, MAX_ROW + 2)]
    else:  # one input is another's beginning, and one comes twice
        base = tokens(200)
        texts = [(base[:n], k) for n, k in ((2, 1), (50, 3), (150, 149), (151, 1), (200, 2), (200, 199), (200, 2))]
    return [Request(index, text, count) for index, (text, count) in enumerate(texts)]


@pytest.mark.parametrize("kind", ["endings", "examples", "windows", "nested"])
def test_every_target_follows_its_own_text(kind: str) -> None:
    requests = random_requests(kind, random.Random(0))
    found: dict[int, list[tuple[tuple[int, ...], int]]] = {request.index: [] for request in requests}
    for unit in plan(requests, batch_tokens=1024):
        for row in (row for batch in unit.batches for row in batch):
            for place, target, index in row.targets:
                text, at = [], place
                while at >= 0:
                    assert row.depths[at] == len(text) or not text or row.depths[at] < row.depths[place]
                    text.append(row.tokens[at])
                    at = row.parents[at]
                assert row.depths[place] == len(text) - 1
                found[index].append((unit.prefix + tuple(reversed(text)), target))
    for request in requests:
        first = len(request.tokens) - request.num_targets
        wanted = [(request.tokens[:k], request.tokens[k]) for k in range(first, len(request.tokens))]
        assert sorted(found[request.index], key=lambda pair: len(pair[0])) == wanted


def test_shared_tokens_are_computed_once() -> None:
    requests = random_requests("endings", random.Random(1))
    distinct = {request.inputs[: k + 1] for request in requests for k in range(len(request.inputs))}
    assert sum(unit.num_tokens for unit in plan(requests, batch_tokens=1)) <= 1.05 * len(distinct)
    examples = random_requests("examples", random.Random(1))
    (unit,) = plan(examples, batch_tokens=1024)
    assert len(unit.prefix) >= 300 > MIN_CACHED
    distinct = {request.inputs[: k + 1] for request in examples for k in range(len(request.inputs))}
    assert len(unit.prefix) + sum(len(row.tokens) for batch in unit.batches for row in batch) <= 1.05 * len(distinct)


def test_ranks_share_all_work_evenly() -> None:
    requests = random_requests("endings", random.Random(2))
    units = plan(requests, batch_tokens=512)
    parts = [share(units, rank, 3) for rank in range(3)]
    indices = [
        target[2]
        for part in parts
        for unit in part
        for batch in unit.batches
        for row in batch
        for target in row.targets
    ]
    assert set(indices) == {request.index for request in requests}
    assert sum(len(part) for part in parts) == len(units)
    loads = [sum(unit.num_tokens for unit in part) for part in parts]
    assert max(loads) - min(loads) <= units[0].num_tokens


def test_batches_stay_within_their_tokens() -> None:
    for unit in plan(random_requests("windows", random.Random(3)), batch_tokens=800):
        for batch in unit.batches:
            assert len(batch) == 1 or len(batch) * max(len(row.tokens) for row in batch) <= 800
