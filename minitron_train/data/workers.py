"""Tokenising processes. Jobs are assigned in turn and units return in order, so their number changes only the speed.

A worker is `python -m minitron_train.data.workers FD`. It reads jobs from its standard input and writes units to the pipe
FD, so that output of a library cannot be mistaken for a unit. It imports neither torch nor the program's main module. It
ends when its standard input closes, also after a kill -9 of the training process. If a worker is killed, the training
ends with one line, and resumes at its last checkpoint.
"""

import contextlib
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
from minitron_train.runtime.errors import MachineError, UserError

EXIT_S = 2.0  # time for a process to exit after its pipe has closed
RESUME = "start again to resume at the last checkpoint"


ANSWERS = (Unit, UserError, RuntimeError)


class Pending(Protocol):
    """A unit that may not be ready yet."""

    def result(self) -> Unit: ...


class Deferred:
    """A unit that this process makes when `result` is called."""

    def __init__(self, make: Callable[[], Unit]) -> None:
        self.result = make


class Pool:
    """`num_workers` processes. With 0, this process runs a job when its result is requested."""

    def __init__(self, maker: UnitMaker, num_workers: int) -> None:
        self.maker = maker
        self.num_workers = num_workers
        self.num_jobs = 0
        self.workers: list[Worker] = []

    def submit(self, job: ReadJob | EncodeJob) -> Pending:
        """Queue a job. The first job starts the processes."""
        if not self.num_workers:
            return Deferred(lambda: self.maker.run(job))
        if not self.workers:
            maker = self.maker
            arguments = (maker.formats, maker.encoder, maker.split, maker.watches, maker.chats)
            self.workers = [Worker(arguments) for _ in range(self.num_workers)]
        worker = self.workers[self.num_jobs % self.num_workers]
        self.num_jobs += 1
        return worker.submit(job)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []


class Worker:
    """One process, seen from the training process.

    Raises:
        MachineError: the process cannot be started, has ended, or sends something that is not a unit.
    """

    def __init__(self, arguments: tuple) -> None:
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        self.waiting: list[Reply] = []  # same order as the worker's answers
        try:
            near, far = os.pipe()
            self.answers = os.fdopen(near, "rb")
            try:
                command = [sys.executable, "-m", "minitron_train.data.workers", str(far)]
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[far])
            finally:
                os.close(far)
        except OSError as error:
            raise MachineError(
                f"data.num_workers: a tokenising process cannot be started ({error.strerror}); free memory or "
                f"processes, or set data.num_workers=0, then {RESUME}"
            ) from error
        self.send(arguments)

    def send(self, message: object) -> None:
        """Pickle one message into the pipe; a thread of the worker reads it immediately."""
        assert self.process.stdin
        try:
            pickle.dump(message, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self.lost("does not answer") from error

    def submit(self, job: ReadJob | EncodeJob) -> "Reply":
        """Queue a job."""
        self.send(job)
        reply = Reply(self)
        self.waiting.append(reply)
        return reply

    def receive(self) -> None:
        """Read the next answer from the pipe."""
        try:
            value = pickle.load(self.answers)
        except Exception as error:  # end of file, or damaged: pickle raises any class
            raise self.lost(f"sent a damaged answer ({type(error).__name__})") from error
        if not isinstance(value, ANSWERS):
            raise self.lost(f"sent a damaged answer ({type(value).__name__})")
        self.waiting.pop(0).value = value

    def lost(self, how: str) -> MachineError:
        """The error when the worker cannot answer. It names how the process ended; a running process is killed."""
        try:
            code = self.process.wait(timeout=EXIT_S)
            how = ended(code) if code else how
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.close()
        return MachineError(f"data.num_workers: tokenising process {self.process.pid} {how}; {RESUME}")

    def close(self) -> None:
        """End the process by closing its input. Unread messages are lost, also if another thread waits for them."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.process.stdin.close()
        self.process.wait()
        self.answers.close()  # last: it would wait for a thread that reads


def ended(code: int) -> str:
    """How a process ended, in words, from subprocess's exit code."""
    if code >= 0:
        return f"ended with exit code {code}; see its message above"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = " (out of memory? lower data.num_workers)" if name == "SIGKILL" else ""
    return f"was killed by {name}{why}"


class Reply:
    """One answer of a worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.value: Unit | UserError | RuntimeError | None = None

    def result(self) -> Unit:
        """Wait for the unit and return it, or raise the worker's error."""
        while self.value is None:
            self.worker.receive()
        if isinstance(self.value, UserError | RuntimeError):
            raise self.value
        return self.value


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Run jobs until the requests end. A thread reads ahead, so that a busy worker does not block the sender."""
    maker = UnitMaker(*pickle.load(requests))
    jobs: queue.SimpleQueue[ReadJob | EncodeJob] = queue.SimpleQueue()

    def read_ahead() -> None:
        try:
            while True:
                jobs.put(pickle.load(requests))
        except (EOFError, pickle.UnpicklingError):  # UnpicklingError: the training process was killed during a write
            os._exit(0)  # nobody waits for an unfinished unit

    threading.Thread(target=read_ahead, daemon=True).start()
    while True:
        try:
            answer = maker.run(jobs.get())
        except (UserError, MachineError) as error:
            answer = error
        except MemoryError:
            answer = MachineError(f"data.num_workers: out of memory while tokenising; free some, then {RESUME}")
        except Exception:  # sent as text: not every exception can be pickled
            answer = RuntimeError(f"in a tokenising process: {traceback.format_exc()}")
        try:
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)


def main() -> None:
    """Serve standard input and the pipe whose number is the argument. Signals are ignored: the training process handles
    them and ends its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # output of libraries goes to the log
    serve(sys.stdin.buffer, os.fdopen(int(sys.argv[1]), "wb"))


if __name__ == "__main__":
    main()
