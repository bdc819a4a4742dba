"""Tokenising processes: jobs go to them in turn, units come back in order, so their number changes nothing but speed.

A worker is `python -m minitron_train.data.workers` between two pipes. It imports neither torch nor the program's
main module, and it ends by itself when its standard input closes: also after a kill -9 of the training process.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from minitron_train.data.units import EncodeJob, ReadJob, Unit, UnitMaker
from minitron_train.errors import UserError


class Pending(Protocol):
    """A unit that may still be in the making."""

    def result(self) -> Unit: ...


class Deferred:
    """A unit that is made in this process when it is asked for."""

    def __init__(self, make: Callable[[], Unit]) -> None:
        self.result = make


class Pool:
    """`num_workers` processes; with 0 the jobs are done in this process when their results are asked for."""

    def __init__(self, maker: UnitMaker, num_workers: int) -> None:
        self.maker = maker
        self.num_workers = num_workers
        self.num_jobs = 0
        self.workers: list[Worker] = []

    def submit(self, job: ReadJob | EncodeJob) -> Pending:
        """Start a job; the processes start with the first one."""
        if not self.num_workers:
            return Deferred(lambda: self.maker.run(job))
        if not self.workers:
            arguments = (self.maker.formats, self.maker.encoder, self.maker.split)
            self.workers = [Worker(arguments) for _ in range(self.num_workers)]
        worker = self.workers[self.num_jobs % self.num_workers]
        self.num_jobs += 1
        return worker.submit(job)

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()
        self.workers = []


class Worker:
    """The near end of one process."""

    def __init__(self, arguments: tuple) -> None:
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "minitron_train.data.workers"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.waiting: list[Reply] = []  # in the order in which the worker will answer
        self.send(arguments)

    def send(self, message: object) -> None:
        """Pickle one message into the pipe; the worker's reading thread takes it at once."""
        assert self.process.stdin
        pickle.dump(message, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self.process.stdin.flush()

    def submit(self, job: ReadJob | EncodeJob) -> "Reply":
        """Queue a job."""
        self.send(job)
        reply = Reply(self)
        self.waiting.append(reply)
        return reply

    def receive(self) -> None:
        """Take the next answer from the pipe."""
        assert self.process.stdout
        try:
            self.waiting.pop(0).value = pickle.load(self.process.stdout)
        except EOFError as error:
            raise RuntimeError(f"a tokenising process ended with code {self.process.wait()}") from error

    def close(self) -> None:
        """Closing its input ends it."""
        assert self.process.stdin and self.process.stdout
        self.process.stdout.close()
        self.process.stdin.close()
        self.process.wait()


class Reply:
    """One answer of a worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.value: Unit | UserError | RuntimeError | None = None

    def result(self) -> Unit:
        """The unit; waits for it, and raises the error that the worker met."""
        while self.value is None:
            self.worker.receive()
        if isinstance(self.value, UserError | RuntimeError):
            raise self.value
        return self.value


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Do jobs until the requests end. A thread reads ahead, so that the other side never waits for a busy worker."""
    maker = UnitMaker(*pickle.load(requests))
    jobs: queue.SimpleQueue[ReadJob | EncodeJob] = queue.SimpleQueue()

    def read_ahead() -> None:
        try:
            while True:
                jobs.put(pickle.load(requests))
        except (EOFError, pickle.UnpicklingError):  # the latter when the training process was killed while it wrote
            os._exit(0)  # nobody waits for the unit that may be in the making

    threading.Thread(target=read_ahead, daemon=True).start()
    while True:
        try:
            answer = maker.run(jobs.get())
        except UserError as error:
            answer = error
        except Exception:  # as text: not every exception can be pickled
            answer = RuntimeError(f"in a tokenising process: {traceback.format_exc()}")
        try:
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)


def main() -> None:
    """Serve standard input and output; signals are for the training process, which decides when to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not end up among the answers
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
