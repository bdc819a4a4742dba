"""Single values of config.json, checked: what must be a number is one, of the right kind and within bounds."""

import math
import reprlib
from typing import Any

from minitron_train.runtime.errors import UserError

MAX_SIZE = 2**31 - 1
MAX_FLOAT = 1e30
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def spoken(value: Any) -> str:
    """A value in a message, at most about a line of it."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        return f"<{type(value).__name__} with a huge number>"


def as_authors_give_it(what: str) -> str:
    """The remedy for a value that only the model's authors know."""
    return f"set {what} as the model's authors give it"


def size(value: Any, key: str, where: str, largest: int = MAX_SIZE) -> int:
    """A whole number from 1 on, written without a decimal point (transformers refuses 64.0).

    Raises:
        UserError: it is none, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        hint = ""
        if isinstance(value, float) and value.is_integer():
            hint = " without a decimal point"
        raise UserError(f"{where}: {key}={spoken(value)} is not a whole number{hint}; {as_authors_give_it('it')}")
    if not 1 <= value <= largest:
        raise UserError(
            f"{where}: {key}={spoken(value)}: must be at least 1 and at most {largest:,}; {as_authors_give_it('it')}"
        )
    return value


def positive_float(value: Any, key: str, where: str) -> float:
    """A finite number above 0.

    Raises:
        UserError: it is none, or out of bounds.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != value
        or value in (math.inf, -math.inf)
    ):
        raise UserError(f"{where}: {key}={spoken(value)} is not a number; {as_authors_give_it('it')}")
    if not 0 < value <= MAX_FLOAT:
        raise UserError(
            f"{where}: {key}={spoken(value)}: must be above 0 and at most {MAX_FLOAT:g}; {as_authors_give_it('it')}"
        )
    return float(value)


def epsilon(value: Any, key: str, where: str) -> float:
    """A float from 0 on and below 1, the small number inside a norm's square root.

    Raises:
        UserError: it is none, or out of bounds.
    """
    if not isinstance(value, float) or not 0 <= value < 1:
        raise UserError(
            f"{where}: {key}={spoken(value)} is not a number from 0.0 to below 1.0; {as_authors_give_it('it')}"
        )
    return value


def truth(value: Any, key: str, where: str) -> bool:
    """true or false.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key}={spoken(value)} is neither true nor false; {as_authors_give_it('it')}")
    return value
