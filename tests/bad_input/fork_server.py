"""Runs the program's command line in forks of one process that has imported it.

A fresh Python spends some seconds on importing torch, megatron-core and transformers before it meets a mistake. This process
imports them once. Each request forks, and the child runs the program's `__main__` with its own arguments, working directory
and files for stdout and stderr. What is decided while modules are imported (the number of threads, the hub's address) is the
server's. Start a fresh Python for a case that sets environment variables.
"""

import atexit
import importlib
import json
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
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NoReturn

import minitron_train

WAIT_S = 0.01


class ForkServer:
    """The server as its client sees it: a process that answers one request at a time, a line of JSON each."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.bad_input.fork_server"]
        root = Path(__file__).parents[2]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=root, env=environ, stdin=pipe, stdout=pipe, text=True)

    def run(self, words: list[str], folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run `python -m minitron_train` with `words` in `folder`; after `timeout_s` it is killed."""
        assert self.process.stdin and self.process.stdout
        request = {"words": words, "folder": str(folder), "timeout_s": timeout_s}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return subprocess.CompletedProcess(words, *json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Answer each request on stdin with [exit code, stdout, stderr] on stdout, until stdin ends."""
    import_all()
    for line in sys.stdin:
        request = json.loads(line)
        answer = run_forked(request["words"], Path(request["folder"]), request["timeout_s"])
        print(json.dumps(answer), flush=True)


def import_all() -> None:
    """Import every module of the program, and with them the libraries that they use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional packages
        for module in pkgutil.walk_packages(minitron_train.__path__, "minitron_train."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def run_forked(words: list[str], folder: Path, timeout_s: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m minitron_train` with `words`, in a fork of this process."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        pid = os.fork()
        if pid == 0:
            _child(words, folder, stdout, stderr)
        code = _wait(pid, timeout_s)
        stdout.seek(0)
        stderr.seek(0)
        return code, stdout.read(), stderr.read()


def _wait(pid: int, timeout_s: float) -> int:
    """The exit code of a child, or minus the signal that ended it; after `timeout_s` that is SIGKILL."""
    end_s = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end_s:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(WAIT_S)


def _child(words: list[str], folder: Path, stdout: IO[str], stderr: IO[str]) -> NoReturn:
    """Be the program; never return to the server."""
    code: object = 1
    try:
        atexit._clear()  # the server's exit functions are not the child's to run
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # stdin holds the server's requests
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
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


if __name__ == "__main__":
    serve()
