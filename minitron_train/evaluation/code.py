"""pass@1 of generated programs. Each program runs in its own namespaces; its tests run in another, isolated process.

`namespaces` documents what a program can see and do, `judge` what a verdict means. eval.allow_code_execution=unsafe uses no
namespaces. Limits on time, memory and files then contain accidents, but not attacks.
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
WAIT_S = 10  # wall-clock time; TIME_S is CPU time
PACKAGES = Path(__file__).parents[2]  # folder of this package
START = "import sys; sys.path.insert(0, sys.argv[1]); from minitron_train.evaluation.judge import main; main()"


def passes(
    program: str, tests: str = "", *, isolated: bool = True, time_s: int = TIME_S, wait_s: float = WAIT_S
) -> bool:
    """Whether a Python program runs to its end without an error within the limits, and then passes the tests.

    It runs as in Hugging Face's `code_eval`: not as `__main__`, with an empty environment and no input. The program never
    sees `tests`. Without tests the program's own process reports the verdict, and a hostile program can forge it.

    Args:
        isolated: use namespaces; without them only the limits apply.
        time_s: CPU time of each of the two processes.
        wait_s: wall-clock time of both.

    Raises:
        UserError: the kernel does not allow namespaces.
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
                one.wait(EXIT_S)  # its end of the pipe closes shortly before the process exits
            if one.returncode == UNAVAILABLE:
                complaint.seek(0)
                raise no_namespaces(complaint.read().decode(errors="replace").strip())
        return said == PASSED


@contextlib.contextmanager
def process(
    role: str, text: str, descriptors: tuple[int, ...], *, folder: str, isolated: bool, time_s: int
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start one of the two processes, and kill it with its children at the end of the block.

    Yields:
        The process, and a file that holds its error message if it cannot start.
    """
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
            with contextlib.suppress(ProcessLookupError):  # no process of its session is left
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def read_until(file: IO[bytes], deadline_s: float) -> bytes:
    """Read a pipe until its other end is closed. Return nothing if the deadline passes first."""
    data = b""
    while (left_s := deadline_s - time.monotonic()) > 0 and select.select([file], [], [], left_s)[0]:
        part = file.read(64)
        if not part:
            return data
        data += part
    return b""


def check_isolation() -> None:
    """Check before an evaluation that the kernel allows namespaces; raises UserError otherwise."""
    passes("", wait_s=60)


def no_namespaces(reason: str) -> UserError:
    """Return the error for a system that cannot isolate generated programs."""
    return UserError(
        f"eval.allow_code_execution=true: this system does not allow the namespaces that isolate generated programs ({reason}); "
        "allow user namespaces, remove the tasks, or accept the risk with eval.allow_code_execution=unsafe"
    )


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]], isolated: bool = True) -> float:
    """Return the fraction of problems whose first program passes its tests; lm-eval's metric of HumanEval and MBPP."""
    first = [programs if isinstance(programs, str) else programs[0] for programs in predictions]
    outcomes = [passes(program, tests, isolated=isolated) for program, tests in zip(first, references, strict=True)]
    return sum(outcomes) / len(outcomes)


def prepend_prompt(resps: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """Prepend each prompt to its completions; the filter of HumanEval."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def mbpp_examples() -> list[dict[str, Any]]:
    """Return MBPP's three few-shot examples, parsed from lm-eval's source. Importing that module would download its metric."""
    import lm_eval.tasks

    source = Path(lm_eval.tasks.__file__).parent / "mbpp" / "utils.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples"
    )
    statement = function.body[-1]
    assert isinstance(statement, ast.Return) and statement.value is not None
    return ast.literal_eval(statement.value)
