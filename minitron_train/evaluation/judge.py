"""The two processes behind `code.passes`: one runs a generated program, the other its tests, and they exchange plain data.

The tests call the program's functions across a socket. So the program's interpreter holds neither the tests nor what
they expect, and nothing in it decides the verdict: a program can only answer, with values of `wire.TAGS`. Each process
is in namespaces of its own (`namespaces.enter`), where it sees and reaches nothing of the other.

What this does not show: that helpers which the tests take from the program (HumanEval/32 calls the prompt's `poly`) are
still the prompt's. Arguments that a function changes in place are changed in the program's copy alone, and functions
that the tests define cannot be handed to the program.
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
NUM_OPEN_FILES = 256  # a file in memory may have FILE_BYTES
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
MAX_ITEMS = 10**6
ENDS_LOOPS = (StopIteration, StopAsyncIteration)  # raised by a function, they would end the tests' loops over map(f, …)


def main() -> None:
    """One of the two: ROLE SOCKET VERDICT ROOT CPU_SECONDS, the text on stdin. ROOT is empty: no namespaces."""
    role, link, verdict, root, time_s = sys.argv[2:]
    text = sys.stdin.buffer.read().decode()
    if root:
        enter(root)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    limits = {resource.RLIMIT_CPU: int(time_s), resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: FILE_BYTES}
    limits |= {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: NUM_OPEN_FILES}
    if root:  # elsewhere it would count all of the user's
        limits[resource.RLIMIT_NPROC] = NUM_PROCESSES
    limit(limits)
    end = socket.socket(fileno=int(link))
    if role == "program":
        Program(end).run(text)
    elif judge(end, text):
        os.write(int(verdict), PASSED)
    os._exit(0)


class Program:
    """The generated program, and its answers. Everything in here is at its mercy."""

    def __init__(self, end: socket.socket) -> None:
        self.space: dict[str, Any] = {}
        self.kept: list[Any] = []  # what the tests have numbers of; kept alive
        self.link = Link(end, self.keep, lambda number: self.kept[number])

    def keep(self, value: Any) -> int:
        """The number of an object that is not plain."""
        for number, known in enumerate(self.kept):
            if known is value:
                return number
        self.kept.append(value)
        return len(self.kept) - 1

    def run(self, text: str) -> None:
        """Execute the text as `code_eval` does, not as `__main__`; then answer until the tests are over."""
        exec(text, self.space)
        self.link.send("ready")
        while True:
            name, *arguments = self.link.receive()
            try:
                self.link.send(["value", getattr(self, f"do_{name}")(*arguments)])
            except (Exception, MemoryError) as error:
                self.link.send(["error", type(error).__name__, [str(part) for part in error.args]])

    def do_find(self, names: list[str]) -> dict[str, Any]:
        """Which of these globals there are."""
        return {name: self.space[name] for name in names if name in self.space}

    def do_call(self, target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What a call gives."""
        return target(*arguments, **named)

    def do_get(self, target: Any, name: str) -> Any:
        """An attribute."""
        return getattr(target, name)

    def do_set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        setattr(target, name, value)

    def do_list(self, target: Any) -> list[Any]:
        """What iterating gives."""
        return [item for _, item in zip(range(MAX_ITEMS), target, strict=False)]

    def do_item(self, target: Any, key: Any) -> Any:
        """target[key]."""
        return target[key]

    def do_len(self, target: Any) -> int:
        """len(target)."""
        return len(target)


class Remote:
    """An object of the program, as the tests see it: it compares equal to itself alone."""

    __slots__ = ("_asks", "_number")

    def __init__(self, asks: "Asks", number: int) -> None:
        object.__setattr__(self, "_asks", asks)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._asks("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._asks("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._asks("set", self, name, value)

    def __iter__(self) -> Any:
        return iter(self._asks("list", self))

    def __getitem__(self, key: Any) -> Any:
        return self._asks("item", self, key)

    def __len__(self) -> int:
        return self._asks("len", self)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


class Asks:
    """Requests of the tests to the program."""

    def __init__(self, end: socket.socket) -> None:
        self.link = Link(end, self.number, lambda number: Remote(self, number))

    @staticmethod
    def number(value: Any) -> int:
        """Of a stand-in; the tests' own objects stay with them."""
        if type(value) is not Remote:
            raise TypeError(f"{type(value).__name__} cannot be handed to a program that is tested")
        return value._number

    def __call__(self, *request: Any) -> Any:
        """The answer, or the error that the program met, as a built-in exception of the same name."""
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
        except TypeError:  # such as UnicodeDecodeError, which takes five
            error = RuntimeError(f"{name}: {arguments}")
        raise error


def judge(end: socket.socket, text: str) -> bool:
    """Whether the program comes to its end and then passes the tests."""
    try:
        asks = Asks(end)
        if asks.link.receive() != "ready":
            return False
        exec(text, imported(asks, text))
        asks("find", [])  # still there: a test that expects any error may have met the loss of it
    except BaseException:
        return False
    return True


def imported(asks: Asks, text: str) -> dict[str, Any]:
    """The program's globals that the tests name.

    Its modules are replaced by true ones. A built-in name is the program's only where it defines no other name of the
    tests, for then it is what is tested (MBPP has a `sum`): `abs = lambda x: 0` must not reach `assert abs(f(1) - 2) < 1e-6`.
    """
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    owners = {
        node.value.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    built_in = {name for name in names if hasattr(builtins, name)}
    space = found(asks, names - built_in) or found(asks, built_in)
    for name in owners & set(space) & sys.stdlib_module_names:
        space[name] = importlib.import_module(name)
    return space


def found(asks: Asks, names: set[str]) -> dict[str, Any]:
    """Which of these globals the program has; others that it adds to its answer (`abs`, `__builtins__`) are left out."""
    answer = asks("find", sorted(names))
    return {name: answer[name] for name in names if name in answer}
