"""A thread that makes the next global batches of a stream while the step computes.

During a step one batch is ready and a second one is being made or ready too. A rank holds at most AHEAD x
global_batch_size / dp_size x seq_length x 20 bytes of them (28 with data.document_attention), and about one unit per
source and worker. The thread tokenises only if data.num_workers is 0; otherwise it waits for the workers and packs.

Each batch carries the position after it. A checkpoint saves the position of the batch that the step has taken, so batches
that a kill destroys are made again.
"""

import contextlib
import queue
import threading
from dataclasses import dataclass

from minitron_train.data.stream import Batch, StreamClosed, TokenStream

AHEAD = 2  # global batches that are ready or being made, besides the one that the step has taken
JOIN_S = 10.0  # time for the thread to notice that it must end; a unit takes about a second


@dataclass(frozen=True, slots=True)
class Made:
    """A global batch, and the stream as it was after this batch."""

    batch: Batch
    state: dict
    passes: dict[str, dict[str, float | None]]

    @classmethod
    def next_of(cls, stream: TokenStream, global_batch_size: int) -> "Made":
        """Make the next batch."""
        batch = stream.next_batch(global_batch_size)
        return cls(batch, stream.state_dict(), stream.passes())


class PrefetchingStream:
    """A TokenStream with the same batches and positions, whose batches are made ahead.

    The first call makes its batch itself: files are opened, and copied if needed, where a signal can interrupt that.
    An error of the thread is raised by the call that would have returned the batch.
    """

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream  # used by the thread alone, once it runs
        self.state, self.read = stream.state_dict(), stream.passes()
        self.thread: threading.Thread | None = None
        self.free = threading.Semaphore(AHEAD)  # batches that may still be made
        self.made: queue.SimpleQueue[Made | Exception] = queue.SimpleQueue()
        self.failure: Exception | None = None

    def next_batch(self, global_batch_size: int) -> Batch:
        """This rank's rows of the next batch; every call must give the same size."""
        if self.failure:
            raise self.failure
        if self.thread is None:
            made: Made | Exception = Made.next_of(self.stream, global_batch_size)
            self.thread = threading.Thread(target=self.make, args=(global_batch_size,), name="prefetch", daemon=True)
            self.thread.start()
        else:
            made = self.made.get()
            self.free.release()
        if isinstance(made, Exception):
            self.failure = made
            raise made
        self.state, self.read = made.state, made.passes
        return made.batch

    def make(self, global_batch_size: int) -> None:
        """The thread's work: make batches until the stream is closed or one fails."""
        with contextlib.suppress(StreamClosed):
            while self.free.acquire():
                try:
                    self.made.put(Made.next_of(self.stream, global_batch_size))
                except StreamClosed:
                    raise
                except Exception as error:
                    self.made.put(error)
                    return

    def state_dict(self) -> dict:
        """See TokenStream.state_dict: the position after the last batch that was returned."""
        return self.state

    def load_state_dict(self, state: dict) -> None:
        """See TokenStream.load_state_dict; call it before the first batch."""
        assert self.thread is None
        self.stream.load_state_dict(state)
        self.state, self.read = self.stream.state_dict(), self.stream.passes()

    def passes(self) -> dict[str, dict[str, float | None]]:
        """See TokenStream.passes, without the batches that were not returned."""
        return self.read

    def close(self) -> None:
        """End the thread and the tokenising processes."""
        self.stream.closing.set()
        self.free.release()
        if self.thread:
            self.thread.join(JOIN_S)
        self.stream.close()
