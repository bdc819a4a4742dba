"""pass@1 of generated programs: each runs in namespaces of its own, and its tests run in another process that it cannot reach.

See `namespaces` for what a program can see and do, `judge` for what a verdict means. eval.allow_code_execution=unsafe
does without the namespaces: the limits on time, memory and files keep an accident small, they are no jail.
"""

import ast
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from minitron_train.evaluation.judge import PASSED
from minitron_train.evaluation.namespaces import UNAVAILABLE
from minitron_train.runtime.errors import UserError

TIME_S = 5
EXIT_S = 0.5
WAIT_S = 10  # by the clock, where TIME_S is of the CPU
PACKAGES = Path(__file__).parents[2]  # where this package is
START = "import sys; sys.path.insert(0, sys.argv[1]); from minitron_train.evaluation.judge import main; main()"


def passes(
    program: str, tests: str = "", *, isolated: bool = True, time_s: int = TIME_S, wait_s: float = WAIT_S
) -> bool:
    """Whether a Python program comes to its end without an error within the limits, and then passes the tests.

    It runs as Hugging Face's `code_eval` runs it, not as `__main__`, with an empty environment and no input. The program
    never sees `tests`. Without tests the verdict is what the program's process says of itself, which a hostile one can forge.

    Args:
        isolated: in namespaces; without them only the limits hold.
        time_s: of the CPU, for each of the two processes.
        wait_s: by the clock, for both.

    Raises:
        UserError: the kernel grants no namespaces.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        link = [stack.enter_context(end) for end in socket.socketpair()]
        reading, writing = os.pipe()
        verdict = stack.enter_context(os.fdopen(reading, "rb", buffering=0))
        with os.fdopen(writing, "wb", buffering=0) as mine:
            running = [
                stack.enter_context(
                    process(role, text, (end.fileno(), *fds), folder=folder, isolated=isolated, time_s=time_s)
                )
                for role, text, end, fds in (
                    ("program", program, link[0], ()),
                    ("tests", tests, link[1], (mine.fileno(),)),
                )
            ]
        for end in link:
            end.close()
        said = read_until(verdict, time.monotonic() + wait_s)
        for one, complaint in running if not said else ():
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(EXIT_S)  # its end of the pipe closes a moment before the process has ended
            if one.returncode == UNAVAILABLE:
                complaint.seek(0)
                raise no_namespaces(complaint.read().decode(errors="replace").strip())
        return said == PASSED


@contextlib.contextmanager
def process(
    role: str, text: str, descriptors: tuple[int, ...], *, folder: str, isolated: bool, time_s: int
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """One of the two processes and what it says when it cannot begin; killed at the end of the block with what it has forked."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as complaint:
        source.write(text.encode(errors="replace"))
        source.seek(0)
        link, verdict = (*descriptors, -1)[:2]
        arguments = [role, str(link), str(verdict), folder if isolated else "", str(time_s)]
        running = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", START, str(PACKAGES), *arguments],
            cwd=folder,
            env={},
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=complaint,
            pass_fds=descriptors,
            start_new_session=True,
        )
        try:
            yield running, complaint
        finally:
            with contextlib.suppress(ProcessLookupError):  # of its session none is left
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def read_until(file: IO[bytes], deadline_s: float) -> bytes:
    """What comes through a pipe until its other end is closed, or the time is over: then nothing."""
    data = b""
    while (left_s := deadline_s - time.monotonic()) > 0 and select.select([file], [], [], left_s)[0]:
        part = file.read(64)
        if not part:
            return data
        data += part
    return b""


def check_isolation() -> None:
    """Refuse now what the first generated program would meet; UserError when the kernel grants no namespaces."""
    passes("", wait_s=60)


def no_namespaces(reason: str) -> UserError:
    """The refusal to run generated programs without a jail."""
    return UserError(
        f"eval.allow_code_execution=true: this system grants no namespaces ({reason}) to isolate generated programs in; "
        "allow user namespaces, leave the tasks out, or accept the risk with eval.allow_code_execution=unsafe"
    )


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]], isolated: bool = True) -> float:
    """lm-eval's metric of HumanEval and MBPP: share of problems whose first program passes its tests."""
    first = [programs if isinstance(programs, str) else programs[0] for programs in predictions]
    outcomes = [passes(program, tests, isolated=isolated) for program, tests in zip(first, references, strict=True)]
    return sum(outcomes) / len(outcomes)


def prepend_prompt(resps: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """HumanEval's filter: the completion goes behind its prompt."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def mbpp_examples() -> list[dict[str, Any]]:
    """MBPP's three prompt rows, read off lm-eval's source: importing that module would download its metric."""
    import lm_eval.tasks

    source = Path(lm_eval.tasks.__file__).parent / "mbpp" / "utils.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples"
    )
    statement = function.body[-1]
    assert isinstance(statement, ast.Return) and statement.value is not None
    return ast.literal_eval(statement.value)
