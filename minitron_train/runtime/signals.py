"""Handlers of Ctrl-C, SIGTERM (schedulers) and SIGUSR1 (Slurm's --signal, before the time limit).

`guard` installs the handler before anything slow is imported. From then on the first signal raises an exception, which
cleans up and ends the process with one line. A training (`StopSignals`) records SIGTERM and SIGUSR1 instead; its loop
saves and ends at the next safe point. No torch here.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_S = 5.0  # Slurm and the job script may both send a signal; a later repeat ends the process without cleaning up


class Stopped(SystemExit):
    """SIGTERM or SIGUSR1 outside a training. Exit code: 128 + the signal's number, on which slurm/common.sh requeues."""


class Guard:
    """The handler of all these signals outside a training.

    Attributes:
        exit_code: set once the command has ended; a later signal ends the process with it.
        received: the first signal; None before it.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.received: int | None = None
        self.received_s = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt, Stopped: it is the first one.
        """
        if self.exit_code is not None:
            os._exit(self.exit_code)
        is_repeated = self.received is not None
        if is_repeated and (number == signal.SIGINT or time.monotonic() - self.received_s > REPEAT_S):
            end_now(number)
        if not is_repeated:
            self.note(number)
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)

    def note(self, number: int) -> None:
        """Record a signal that is being handled."""
        self.received, self.received_s = number, time.monotonic()


def end_now(number: int) -> NoReturn:
    """Print what ended the process, and exit at once: during Python's shutdown another signal would print a traceback."""
    line = f"{signal.Signals(number).name}: ended; finished stages are kept, start again to continue"
    if number == signal.SIGINT:
        line = "interrupted; finished stages are kept"
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


def open_standard_streams() -> None:
    """Open /dev/null for the streams that the caller closed (`>&-`): a file opened later would get their output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def guard(command: Callable[[], int]) -> NoReturn:
    """Run a command as this process: handle signals from here on, exit with the command's exit code."""
    open_standard_streams()
    handler = Guard()
    for number in (signal.SIGINT, *STOP_SIGNALS):
        if number in STOP_SIGNALS or signal.getsignal(number) is not signal.SIG_IGN:  # a background job ignores Ctrl-C
            signal.signal(number, handler)
    try:
        handler.exit_code = command()
        sys.stdout.flush()
    except (KeyboardInterrupt, Stopped):
        end_now(handler.received or signal.SIGINT)
    except SystemExit as ending:  # a training that was asked to stop, or a closed output pipe
        handler.exit_code = ending.code if isinstance(ending.code, int) else 1
        raise
    sys.exit(handler.exit_code)


class Interrupted(Exception):
    """A recorded signal ended an evaluation inside a training. All ranks raise it; the next start evaluates again."""


class StopSignals:
    """Context manager of a training: the first of STOP_SIGNALS is recorded instead of ending the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self.previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            if self.received is not None and isinstance(handler, Guard):
                handler.note(
                    signal.Signals[self.received]
                )  # the run ends because of it: a second delivery changes nothing
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
