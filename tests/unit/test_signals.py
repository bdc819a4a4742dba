"""Signals from the first import on: one line, no traceback, a code that slurm/common.sh understands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_train.runtime.signals import Guard, StopSignals

AT_IMPORT = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and os.path.exists({go!r}):
            os.unlink({go!r})
            for number in {numbers}:
                os.kill(os.getpid(), number)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Sender())
from minitron_train import __main__
__main__.main()
"""
INT, TERM, USR1 = int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGUSR1)
KEPT = "finished stages are kept"


@pytest.mark.parametrize(
    ("module", "numbers", "code", "line"),
    [
        ("minitron_train.commands.cli", [INT], 130, f"interrupted; {KEPT}"),
        ("hydra", [INT, INT], 130, f"interrupted; {KEPT}"),
        ("minitron_train.commands.cli", [TERM, TERM], 143, f"SIGTERM: ended; {KEPT}, start again to continue"),
        ("torch", [USR1], 138, f"SIGUSR1: ended; {KEPT}, start again to continue"),
        ("torch", [INT, INT], 130, f"interrupted; {KEPT}"),
    ],
)
def test_a_signal_while_modules_are_imported(
    tmp_path: Path, module: str, numbers: list[int], code: int, line: str
) -> None:
    (tmp_path / "go").touch()
    program = AT_IMPORT.format(module=module, numbers=numbers, go=str(tmp_path / "go"))
    words = ["score", "teacher.path=.", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert not (tmp_path / "go").exists(), "the module was imported"
    assert (done.returncode, done.stderr.splitlines()) == (code, [line])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_lead_nowhere(tmp_path: Path, closed: str) -> None:
    """Else `print` fails, or what it prints lands in the first file that the program opens."""
    program = """
import os, sys
from minitron_train.runtime.signals import guard

def command():
    with open(sys.argv[1], "w") as file:
        print("out", flush=True), print("err", file=sys.stderr)
        os.system("echo child; echo child >&2")
        return 0 if file.fileno() > 2 and sys.stdin is not None else 1

guard(command)
"""
    words = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == ""
    assert done.stdout == ("" if ">&-" in closed.split() else "out\nchild\n")
    assert done.stderr == ("" if "2>&-" in closed else "err\nchild\n")


def test_a_log_on_a_full_disk_ends_the_command_in_one_line() -> None:
    program = """
import sys
from minitron_train.runtime.masking import Output
from minitron_train.runtime.signals import guard
sys.stdout = Output(sys.stdout)
guard(lambda: print("step 1"))
"""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    line = "error: the disk that takes the output is full; free space and start again"
    assert (done.returncode, done.stderr.splitlines()) == (1, [line])


def test_a_training_notes_the_signal_and_a_second_delivery_changes_nothing() -> None:
    """Slurm and the job script both send it; the process ends with the training's own code."""
    guard = Guard()
    old = signal.signal(signal.SIGTERM, guard)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) is guard
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
