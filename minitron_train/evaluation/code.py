"""pass@1 of generated programs, each run in a process of its own with limits on time, memory and files.

The limits keep an accident small; they are no jail. That is why eval.allow_code_execution is off by default.
"""

import ast
import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIME_S = 5
WAIT_S = 10  # by the clock, where TIME_S is of the CPU
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20


def passes(program: str, time_s: int = TIME_S, wait_s: int = WAIT_S) -> bool:
    """Whether a Python program comes to its last line without an error within the limits.

    It runs as Hugging Face's `code_eval` runs it, not as `__main__`; isolated (-I) in an empty scratch folder, with an
    empty environment and no input; what it has forked ends with it.
    """
    # exit status 0 is no proof: a program that calls exit() before its tests has it too. So the process is given a
    # random token on its input, and only the line behind the program's last one writes it into `proof`.
    token = secrets.token_bytes()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as proof:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", LIMITED, str(proof.fileno()), str(time_s), str(len(token))],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[proof.fileno()],
            start_new_session=True,
        )
        try:
            process.communicate(token + program.encode(errors="replace"), wait_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):  # of its session none is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        proof.seek(0)
        return proof.read() == token


LIMITED = f"""
import os, resource, sys
def run(token, program, proof, leave=os._exit, write=os.pwrite):
    exec(program, {{}})
    write(proof, token, 0)
    leave(0)
proof, time_s, size = map(int, sys.argv[1:])
for limit, value in (
    ({resource.RLIMIT_CPU}, time_s), ({resource.RLIMIT_AS}, {MEMORY_BYTES}), ({resource.RLIMIT_FSIZE}, {FILE_BYTES}),
):
    resource.setrlimit(limit, (value, value))
run(sys.stdin.buffer.read(size), sys.stdin.buffer.read().decode(), proof)
"""


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> float:
    """lm-eval's metric of HumanEval and MBPP: share of problems whose first program passes its tests."""
    first = [programs if isinstance(programs, str) else programs[0] for programs in predictions]
    outcomes = [passes(f"{program}\n{test}\n") for program, test in zip(first, references, strict=True)]
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
