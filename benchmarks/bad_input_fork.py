"""The program's command line as a process of its own, started in a moment: a fork of a process that has imported it all.

A fresh Python spends some seconds on importing torch, megatron-core and transformers before it can meet a mistake. Here the
imports are done once. Each call forks, and the child runs `python -m minitron_train`'s own `__main__` with its own arguments,
working directory, environment and files for stdout and stderr. What is decided while modules are imported (the number of
threads, the hub's address) is the parent's; a case that sets environment variables needs a fresh Python.
"""

import atexit
import importlib
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import IO, NoReturn

import minitron_train

WAIT_S = 0.01


def import_all() -> None:
    """Import every module of the program, and with them the libraries that they use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional packages
        for module in pkgutil.walk_packages(minitron_train.__path__, "minitron_train."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def run_forked(words: list[str], folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run `python -m minitron_train` with `words` in `folder`, in a fork of this process.

    Raises:
        subprocess.TimeoutExpired: it did not end within `timeout_s`.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(words, folder, said, complained)
        code = _wait(pid, words, timeout_s)
        said.seek(0)
        complained.seek(0)
        return subprocess.CompletedProcess(words, code, said.read(), complained.read())


def _wait(pid: int, words: list[str], timeout_s: float) -> int:
    """The exit code of a child; negative is the signal that ended it."""
    end_s = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise subprocess.TimeoutExpired(words, timeout_s)
        time.sleep(WAIT_S)


def _child(words: list[str], folder: Path, said: IO[str], complained: IO[str]) -> NoReturn:
    """Be the program; never return to the benchmark."""
    code: object = 1
    try:
        atexit._clear()  # the parent's scratch folders are not the child's to delete
        os.dup2(said.fileno(), 1)
        os.dup2(complained.fileno(), 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)  # type: ignore[misc]
        os.chdir(folder)
        sys.path[0] = str(folder)  # as `python -m` has it
        sys.argv = [minitron_train.__path__[0] + "/__main__.py", *words]
        runpy.run_module("minitron_train", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)
