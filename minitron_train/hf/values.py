"""Checks single values of config.json: type and range."""

import math
import reprlib
from typing import Any

from minitron_train.runtime.errors import UserError

MAX_SIZE = 2**31 - 1
MIN_FLOAT, MAX_FLOAT = 1e-30, 1e30
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def spoken(value: Any) -> str:
    """A value as a message shows it, shortened to about a line."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python does not print integers with thousands of digits
        return f"<{type(value).__name__} with a huge number>"


def as_authors_give_it(what: str) -> str:
    """The remedy for a missing value that only the model's authors know."""
    return f"set {what} as the model's authors give it"


def size(value: Any, key: str, where: str, largest: int = MAX_SIZE) -> int:
    """Check an integer of at least 1, written without a decimal point (transformers rejects 64.0).

    Raises:
        UserError: the value has another type, or is out of range.
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
    """Check a finite number above 0, which fp32 holds.

    Raises:
        UserError: the value has another type, or is out of range.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != value
        or value in (math.inf, -math.inf)
    ):
        raise UserError(f"{where}: {key}={spoken(value)} is not a number; {as_authors_give_it('it')}")
    if not MIN_FLOAT <= value <= MAX_FLOAT:
        raise UserError(
            f"{where}: {key}={spoken(value)}: must be above 0, from {MIN_FLOAT:g} to {MAX_FLOAT:g}; "
            f"{as_authors_give_it('it')}"
        )
    return float(value)


def positive_number(value: Any, key: str, where: str) -> int | float:
    """Check a finite number above 0, and keep its type: transformers' classes reject 256.0 where they want 256.

    Raises:
        UserError: the value has another type, or is out of range.
    """
    positive_float(value, key, where)
    return value


def epsilon(value: Any, key: str, where: str) -> float:
    """Check a norm's epsilon: a float, at least 0 and below 1.

    Raises:
        UserError: the value has another type, or is out of range.
    """
    if not isinstance(value, float) or not 0 <= value < 1:
        raise UserError(
            f"{where}: {key}={spoken(value)} is not a number from 0.0 to below 1.0; {as_authors_give_it('it')}"
        )
    return value


def truth(value: Any, key: str, where: str) -> bool:
    """Check a boolean.

    Raises:
        UserError: the value is neither true nor false.
    """
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key}={spoken(value)} is neither true nor false; {as_authors_give_it('it')}")
    return value
