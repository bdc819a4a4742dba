"""Plain data between two Python processes that do not trust each other: tagged JSON, which cannot run code.

The receiver creates only JSON's types and the types of `TAGS`, never a subclass. A value that compares equal to everything
can therefore not be sent. Any other object stays in its process and is sent as a number; the receiver makes a proxy for it.
"""

import json
import socket
import struct
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_BYTES = 32 * 2**20  # size of one message
PLAIN_INT = 2**63  # larger integers are sent in hex, because Python limits the digits of decimal ones

TAGS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {  # type, to JSON, from JSON
    "tuple": (tuple, list, tuple),
    "dict": (dict, lambda value: [list(item) for item in value.items()], dict),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "bytes": (bytes, lambda value: value.decode("latin-1"), lambda text: text.encode("latin-1")),
    "bytearray": (bytearray, lambda value: value.decode("latin-1"), lambda text: bytearray(text, "latin-1")),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    "fraction": (Fraction, lambda value: [value.numerator, value.denominator], lambda parts: Fraction(*parts)),
    "decimal": (Decimal, str, Decimal),
    "int": (int, hex, lambda text: int(text, 16)),
}
BASES: tuple[Any, ...] = (
    bool,
    int,
    float,
    str,
    list,
    tuple,
    dict,
    set,
    frozenset,
    bytes,
    bytearray,
)  # a subclass is sent as its base


class ConnectionLost(BaseException):
    """The other process has ended or sent an invalid message. It is not an Exception, so that no test can expect it."""


class Link:
    """Sends and receives messages over a socket.

    Args:
        keep: returns the number of an object that cannot be sent as plain data.
        find: returns the object for a received number.
    """

    def __init__(self, end: socket.socket, keep: Callable[[Any], int], find: Callable[[int], Any]) -> None:
        self.end, self.keep, self.find = end, keep, find

    def send(self, message: Any) -> None:
        """Send one message of plain data and of objects that `keep` numbers.

        Raises:
            ValueError: the message exceeds MAX_BYTES.
            ConnectionLost: the other process has ended.
        """
        data = json.dumps(self.encode(message)).encode("ascii")
        if len(data) > MAX_BYTES:
            raise ValueError("the message is too long")
        try:
            self.end.sendall(struct.pack(">Q", len(data)) + data)
        except OSError:
            raise ConnectionLost from None

    def receive(self) -> Any:
        """Return the next message. Raises ConnectionLost if the other process has ended or the message is invalid."""
        (size,) = struct.unpack(">Q", self._read(8))
        if size > MAX_BYTES:
            raise ConnectionLost
        try:
            return self.decode(json.loads(self._read(size)))
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            raise ConnectionLost from None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self.end.recv(min(size - len(data), 1 << 20))
            except OSError:
                raise ConnectionLost from None
            if not part:
                raise ConnectionLost
            data += part
        return bytes(data)

    def encode(self, value: Any) -> Any:
        """Convert a value to JSON types."""
        value = as_base(value)
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and abs(value) < PLAIN_INT):
            return value
        if kind is list:
            return [self.encode(item) for item in value]
        for tag, (known, pack, _) in TAGS.items():
            if kind is known:
                packed = pack(value)
                return {tag: self.encode(packed) if isinstance(packed, list) else packed}
        return {"object": self.keep(value)}

    def decode(self, value: Any) -> Any:
        """Inverse of `encode`."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, packed),) = value.items()
        return self.find(int(packed)) if tag == "object" else TAGS[tag][2](self.decode(packed))


def as_base(value: Any) -> Any:
    """Convert an instance of a plain type's subclass (Counter, namedtuple, IntEnum, NumPy scalar) to that plain type."""
    kind = type(value)
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    base = next((base for base in BASES if isinstance(value, base)), kind)
    return value if kind is base else base(value)
