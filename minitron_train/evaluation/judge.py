"""The two processes of `code.passes`: one runs a generated program, the other its tests. They exchange plain data.

The tests call the program's functions through a socket. The program's interpreter therefore contains neither the tests nor
the expected values, and it does not decide the verdict. A program can only answer with values of `wire.TAGS`. Each process
is isolated from the other in its own namespaces (`namespaces.enter`).

Limits: a program may replace helper functions of the prompt that the tests call (HumanEval/32 calls `poly`). If a function
modifies its arguments in place, only the program's copy changes. Functions of the tests cannot be passed to the program.
"""

import ast
import builtins
import importlib
import os
import resource
import socket
import sys
from typing import Any

from minitron_train.evaluation.namespaces import enter, limit
from minitron_train.evaluation.wire import Link

PASSED = b"passed"
NUM_PROCESSES = 16
NUM_OPEN_FILES = 256  # bounds the memory of in-memory files, FILE_BYTES each
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
MAX_ITEMS = 10**6
ENDS_LOOPS = (StopIteration, StopAsyncIteration)  # raised by a function f, they would end a test's loop over map(f, …)


def main() -> None:
    """Run one of the two processes. Arguments: ROLE SOCKET VERDICT ROOT CPU_SECONDS; an empty ROOT means no namespaces.

    The program or the tests are read from stdin.
    """
    role, link, verdict, root, time_s = sys.argv[2:]
    text = sys.stdin.buffer.read().decode()
    if root:
        enter(root)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    limits = {resource.RLIMIT_CPU: int(time_s), resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: FILE_BYTES}
    limits |= {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: NUM_OPEN_FILES}
    if root:  # outside namespaces this limit would count all processes of the user
        limits[resource.RLIMIT_NPROC] = NUM_PROCESSES
    limit(limits)
    end = socket.socket(fileno=int(link))
    if role == "program":
        Program(end).run(text)
    elif judge(end, text):
        os.write(int(verdict), PASSED)
    os._exit(0)


class Program:
    """Runs the generated program and answers requests. The program can tamper with everything in this process."""

    def __init__(self, end: socket.socket) -> None:
        self.space: dict[str, Any] = {}
        self.kept: list[Any] = []  # objects that the tests refer to by number
        self.link = Link(end, self.keep, lambda number: self.kept[number])

    def keep(self, value: Any) -> int:
        """Return the number of an object that cannot be sent as plain data."""
        for number, known in enumerate(self.kept):
            if known is value:
                return number
        self.kept.append(value)
        return len(self.kept) - 1

    def run(self, text: str) -> None:
        """Execute the text as `code_eval` does, not as `__main__`, then answer requests until the tests end."""
        exec(text, self.space)
        self.link.send("ready")
        while True:
            name, *arguments = self.link.receive()
            try:
                self.link.send(["value", getattr(self, f"do_{name}")(*arguments)])
            except (Exception, MemoryError) as error:
                self.link.send(["error", type(error).__name__, [str(part) for part in error.args]])

    def do_find(self, names: list[str]) -> dict[str, Any]:
        """Return those of the named globals that exist."""
        return {name: self.space[name] for name in names if name in self.space}

    def do_call(self, target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return target(*arguments, **named)

    def do_get(self, target: Any, name: str) -> Any:
        return getattr(target, name)

    def do_set(self, target: Any, name: str, value: Any) -> None:
        setattr(target, name, value)

    def do_list(self, target: Any) -> list[Any]:
        """Return at most MAX_ITEMS items of an iterable."""
        return [item for _, item in zip(range(MAX_ITEMS), target, strict=False)]

    def do_item(self, target: Any, key: Any) -> Any:
        return target[key]

    def do_len(self, target: Any) -> int:
        return len(target)


class Remote:
    """A proxy in the tests for an object of the program. It compares equal only to itself."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: "Requester", number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)

    def __iter__(self) -> Any:
        return iter(self._ask("list", self))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self, key)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


class Requester:
    """Sends requests of the tests to the program."""

    def __init__(self, end: socket.socket) -> None:
        self.link = Link(end, self.number, lambda number: Remote(self, number))

    @staticmethod
    def number(value: Any) -> int:
        """Return the number of a proxy. The tests' own objects cannot be sent.

        Raises:
            TypeError: `value` is not a proxy.
        """
        if type(value) is not Remote:
            raise TypeError(f"{type(value).__name__} cannot be passed to the tested program")
        return value._number

    def __call__(self, *request: Any) -> Any:
        """Return the answer, or raise the program's error as the built-in exception of the same name."""
        self.link.send(list(request))
        kind, *answer = self.link.receive()
        if kind == "value":
            return answer[0]
        name, arguments = answer
        known = getattr(builtins, name, None)
        if not (isinstance(known, type) and issubclass(known, Exception)) or issubclass(known, ENDS_LOOPS):
            raise RuntimeError(f"{name}: {arguments}")
        try:
            error = known(*arguments)
        except TypeError:  # other arguments are needed, for example five by UnicodeDecodeError
            error = RuntimeError(f"{name}: {arguments}")
        raise error


def judge(end: socket.socket, text: str) -> bool:
    """Whether the program runs to its end and then passes the tests."""
    try:
        ask = Requester(end)
        if ask.link.receive() != "ready":
            return False
        exec(text, imported(ask, text))
        ask("find", [])  # a test that expects any error also passes if the program has died, so check that it lives
    except BaseException:
        return False
    return True


def imported(ask: Requester, text: str) -> dict[str, Any]:
    """Return the program's globals that the tests name.

    Modules are replaced by the real ones. A built-in name is taken from the program only if the program defines no other
    name of the tests, because then it is the tested function (MBPP has a `sum`). Otherwise a program with
    `abs = lambda x: 0` would pass `assert abs(f(1) - 2) < 1e-6`.
    """
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    owners = {
        node.value.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    built_in = {name for name in names if hasattr(builtins, name)}
    space = found(ask, names - built_in) or found(ask, built_in)
    for name in owners & set(space) & sys.stdlib_module_names:
        space[name] = importlib.import_module(name)
    return space


def found(ask: Requester, names: set[str]) -> dict[str, Any]:
    """Return the named globals of the program, without any others that it adds to its answer (`abs`, `__builtins__`)."""
    answer = ask("find", sorted(names))
    return {name: answer[name] for name in names if name in answer}
