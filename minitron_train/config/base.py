"""Building blocks of the sections: fields with a help text, and checks that name key, value, rule and remedy."""

from dataclasses import field
from enum import StrEnum
from typing import Any

from minitron_train.runtime.errors import UserError


def opt(default: Any, text: str, *, path: bool = False) -> Any:
    """A field with a help text; lists and sections are given as factories.

    Args:
        path: the value is a path of this machine, so a leading ~ is expanded (see overrides.py).
    """
    metadata = {"help": text, "path": path}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, key: str, value: Any, rule: str, remedy: str) -> None:
    """Refuse one setting: names key, value, rule and remedy."""
    if not condition:
        raise UserError(f"{key}={value}: {rule}; {remedy}")


def require_positive(section: Any, prefix: str, *names: str) -> None:
    """Refuse 0 and negative numbers (None means "not given" and passes)."""
    for name in names:
        value = getattr(section, name)
        require(
            value is None or value > 0, f"{prefix}.{name}", value, "must be greater than 0", "set a positive number"
        )


class Precision(StrEnum):
    """Dtype of weights and activations; auto is the machine's faster one (planning.precision).

    The optimizer keeps fp32 master weights in any case.
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
