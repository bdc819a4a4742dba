"""The prefetching stream: the batches and positions of the plain one, bounded, and ended without a trace."""

import gc
import json
import random
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_train.config import DataConfig
from minitron_train.data.prefetch import AHEAD, PrefetchingStream
from minitron_train.data.stream import Batch, TokenStream
from minitron_train.runtime.errors import UserError
from tests.unit.test_data_resume import data_set, same
from tests.unit.test_data_stream import texts, write_source

pytestmark = pytest.mark.usefixtures("small_units")

SEQ_LENGTH, ROWS, NUM_BATCHES = 64, 24, 30


def wait_until_full(stream: PrefetchingStream) -> None:
    """Wait until the thread has made as much as it may."""
    deadline_s = time.monotonic() + 30
    while stream.made.qsize() < AHEAD and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert stream.made.qsize() == AHEAD


@pytest.mark.parametrize(("kind", "num_workers"), [("jsonl", 0), ("jsonl", 2), ("bin", 0), ("hub_parquet", 1)])
def test_batches_and_positions_are_those_of_the_plain_stream(kind, num_workers, tmp_path, tokenizer):
    """Over three passes, killed twice where up to two batches have been made and not taken: they are made again."""
    folder = tmp_path / kind
    data = data_set(folder, kind) if kind == "hub_parquet" else write_source(tmp_path, kind, texts(100), tokenizer)
    data = replace(data, num_workers=num_workers, document_attention=True)

    def make() -> TokenStream:
        return TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3)

    plain, ahead = make(), PrefetchingStream(make())
    kills = random.Random(kind).sample(range(2, NUM_BATCHES), 2)
    for number in range(NUM_BATCHES):
        if number in kills:
            wait_until_full(ahead)
            state = json.loads(json.dumps(ahead.state_dict()))
            ahead.close()
            plain.close()
            plain, ahead = make(), PrefetchingStream(make())
            for stream in (plain, ahead):
                stream.load_state_dict(state)
        assert same(ahead.next_batch(ROWS), plain.next_batch(ROWS)), number
        assert ahead.state_dict() == plain.state_dict() and ahead.passes() == plain.passes(), number
    assert plain.packers[0].position and plain.packers[0].position["epoch"] >= 2
    plain.close()
    ahead.close()


def test_at_most_two_batches_are_held(tmp_path, tokenizer, monkeypatch):
    """Counted as living objects, while the step holds none and the thread has had time to make more."""
    living: weakref.WeakSet[Any] = weakref.WeakSet()
    next_batch = TokenStream.next_batch

    def counted(self: TokenStream, size: int) -> Batch:
        batch = next_batch(self, size)
        living.add(batch.tokens_BS)
        return batch

    monkeypatch.setattr(TokenStream, "next_batch", counted)
    data = write_source(tmp_path, "jsonl", texts(100), tokenizer)
    stream = PrefetchingStream(TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3))
    for _ in range(4):
        stream.next_batch(ROWS)
        wait_until_full(stream)
        time.sleep(0.05)
        gc.collect()
        assert len(living) == AHEAD
    stream.close()


def test_an_error_arrives_with_its_batch(tmp_path, tokenizer, monkeypatch):
    """Batches before the error are returned; then every call raises it, and the position is the last good one."""
    next_batch, made = TokenStream.next_batch, []

    def failing(self: TokenStream, size: int) -> Batch:
        made.append(size)
        if len(made) == 4:
            raise UserError("corpus.jsonl: was deleted")
        return next_batch(self, size)

    monkeypatch.setattr(TokenStream, "next_batch", failing)
    data = write_source(tmp_path, "jsonl", texts(100), tokenizer)
    stream = PrefetchingStream(TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3))
    for _ in range(3):
        stream.next_batch(ROWS)
    state = stream.state_dict()
    for _ in range(2):
        with pytest.raises(UserError, match=r"^corpus.jsonl: was deleted$"):
            stream.next_batch(ROWS)
    assert stream.state_dict() == state
    stream.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_busy", [False, True])
def test_closing_leaves_no_thread_and_no_process(num_workers, is_busy, tmp_path, tokenizer):
    """While the thread waits for room, and in the middle of a long batch."""
    documents = texts(100)
    data = replace(write_source(tmp_path, "jsonl", documents, tokenizer), num_workers=num_workers)
    stream = PrefetchingStream(TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3))
    stream.next_batch(ROWS)
    if is_busy:
        stream.close()
        stream = PrefetchingStream(TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3))
        stream.thread = threading.Thread(target=stream.make, args=(200_000,), daemon=True)
        stream.thread.start()
        while not stream.stream.packers[0].position:
            time.sleep(0.001)
    else:
        wait_until_full(stream)
    processes = [worker.process for worker in stream.stream.feed.pool.workers]
    stream.close()
    assert stream.thread and not stream.thread.is_alive()
    assert [process.poll() for process in processes] == [0] * num_workers


def test_a_worker_that_does_not_answer_delays_no_end(tmp_path, tokenizer, monkeypatch):
    """The thread waits for an answer that does not come; closing ends the process all the same."""
    monkeypatch.setattr("minitron_train.data.prefetch.JOIN_S", 0.1)
    data = DataConfig(path=str(write_slow(tmp_path)), num_workers=1)
    stream = PrefetchingStream(TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3))
    stream.thread = threading.Thread(target=stream.make, args=(ROWS,), daemon=True)
    stream.thread.start()
    while not stream.stream.feed.pool.workers:
        time.sleep(0.001)
    (worker,) = stream.stream.feed.pool.workers
    stream.close()
    assert worker.process.poll() == 0
    stream.thread.join(10)
    assert not stream.thread.is_alive() and not stream.stream.feed.pool.workers


def write_slow(folder: Path) -> Path:
    """One document that takes seconds to tokenise."""
    path = folder / "slow.txt"
    path.write_text("abcdefghij" * 3_000_000)
    return path
