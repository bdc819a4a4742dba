"""Stands where Python does in a job script, so that the scripts' own behaviour is tested in seconds.

Called as `fake_trainer.py -m minitron_train COMMAND [OVERRIDE…]`; an override act.COMMAND=NAME picks one of ACTS. Everything goes
into the folder $FAKE: `lives`, a line per start of rank 0, and `argv.RANK`, the words that arrived. act.COMMAND.MEMBER=NAME is
for one member of a family. A file `chain` in this folder replaces the jobs that `chain` answers.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE"])
RANK = int(os.environ.get("SLURM_PROCID", "0"))
LIVES = FOLDER / "lives"
MARK = FOLDER / "train" / "stopped.json"
ANSWERS = {
    "chain": ["- score", "0 prune", "1 distill", "2 export"],
    "candidates": [FOLDER, 3],
    "accept": [],
    "check": [MARK],
}


def succeed() -> None:
    """A finished command."""


def train() -> None:
    """Runs until it is told to save; its second life finds the work done."""
    if life() == 1:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, save)
        time.sleep(300)


def train_late() -> None:
    """As train, but the warning finds it in a step that takes too long."""
    if life() == 1:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, save)
        time.sleep(300)


def save(number: int, _: object) -> None:
    """What all ranks do at a signal."""
    if RANK == 0:
        print(f"saved after {signal.Signals(number).name}")
        MARK.parent.mkdir(exist_ok=True)
        MARK.write_text(signal.Signals(number).name)
    sys.exit(0)


def crash() -> None:
    """A fault of the machine: in its first life after a checkpoint, in its second one before the next."""
    if life() == 1:
        advance()
    sys.exit(1)


def break_down() -> None:
    """A GPU fails after a checkpoint, in rank 1's first life; rank 0 waits for it in a collective."""
    if life() == 1:
        if RANK == 1:
            advance()
            print("RuntimeError: CUDA error: uncorrectable ECC error encountered", file=sys.stderr)
        else:
            time.sleep(300)
        sys.exit(1)


def miss() -> None:
    """The node of rank 1 is gone after a checkpoint: rank 0 reports it, and fails itself."""
    if life() == 1:
        if RANK == 0:
            advance()
            print(
                "RuntimeError: rank 0, step 8: rank 1 on n2 has ended or hangs, last heartbeat at step 7",
                file=sys.stderr,
            )
        else:
            time.sleep(300)
        sys.exit(1)


def advance() -> None:
    """A checkpoint."""
    (MARK.parent / "checkpoints").mkdir(parents=True)
    (MARK.parent / "checkpoints" / "latest").write_text("step_00000200\n")


def load() -> None:
    """Still importing: a signal ends it. Its second life is quick."""
    if life() == 1:
        time.sleep(300)


def refuse() -> None:
    """A user's mistake."""
    sys.exit(2)


def fail() -> None:
    """Rank 1 ends with an error, rank 0 waits for it in a collective."""
    time.sleep(0.5 if RANK == 1 else 300)
    sys.exit(3)


def vanish() -> None:
    """Rank 1 is killed, as by the kernel when memory is short."""
    time.sleep(0.5 if RANK == 1 else 300)
    os.kill(os.getpid(), signal.SIGKILL)


ACTS = {act.__name__: act for act in (succeed, train, train_late, crash, break_down, miss, load, refuse, fail, vanish)}


def life() -> int:
    """How often rank 0 has been started, this time included."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1


def main() -> None:
    """Answer as minitron_train.commands.slurm does, or act as a command."""
    _, module, command, *words = sys.argv[1:]
    if module == "minitron_train.commands.slurm":
        answer = ANSWERS[command]
        if command == "chain":
            own = FOLDER / "chain"
            answer = [FOLDER, *(own.read_text().splitlines() if own.exists() else answer)]
        print("\n".join(map(str, answer)))
        return
    scratch = FOLDER / f"argv.{RANK}.{os.getpid()}"
    scratch.write_text(json.dumps([command, *words]))
    scratch.rename(FOLDER / f"argv.{RANK}")  # whole: tasks of an array write the same file, and a test reads it
    if RANK == 0:
        with LIVES.open("a") as lives:
            print(life(), file=lives)
    members = [word.removeprefix("member=") for word in words if word.startswith("member=")]
    prefixes = tuple(f"act.{name}=" for name in (command, *(f"{command}.{member}" for member in members)))
    chosen = [word.partition("=")[2] for word in words if word.startswith(prefixes)]
    ACTS[chosen[0] if chosen else "succeed"]()


main()
