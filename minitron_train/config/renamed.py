"""Keys with a new name. The old name works for one version and prints one line that names the new one."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minitron_train.runtime.console import warn
from minitron_train.runtime.errors import UserError

RENAMED = {  # old key: new key, in the same section
    "calibration.teacher_share": "calibration.self_generated_fraction",
    "calibration.tokens": "calibration.tokens_path",
    "cluster.utilisation": "cluster.gemm_efficiency",
    "distill.memory_budget_u": "distill.logit_memory_fraction",
    "eval.batch_size": "eval.validation_batch_size",
}
WORD = re.compile(r"(?P<prefix>\+{0,2}|~)(?P<key>[\w.]+)(?P<rest>(?:=.*)?)", re.DOTALL)  # +key=value, ~key


def current_words(words: Sequence[str]) -> list[str]:
    """The words of a command line with old keys replaced by the new ones.

    Raises:
        UserError: both names of a key are given.
    """
    matches = [WORD.fullmatch(word) for word in words]
    keys = {match["key"] for match in matches if match}
    found = []
    for word, match in zip(words, matches, strict=True):
        if match and match["key"] in RENAMED:
            word = f"{match['prefix']}{new_name(match['key'], keys, 'command line')}{match['rest']}"
        found.append(word)
    return found


def current_settings(settings: Mapping[Any, Any], where: str | None, section: str = "") -> dict[Any, Any]:
    """Settings, nested or with dotted keys, with old keys replaced by the new ones.

    Args:
        where: the file or call that holds them, for the message; None for records of earlier runs, which give none.
        section: dotted name of the section that `settings` belongs to; "" for the whole configuration.

    Raises:
        UserError: both names of a key are given.
    """
    prefix = f"{section}." if section else ""
    keys = {f"{prefix}{key}" for key in settings}
    found = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in RENAMED:
            key = new_name(key, keys, where)
            name = key.removeprefix(prefix)
        found[name] = current_settings(value, where, key) if isinstance(value, Mapping) else value
    return found


def new_name(old: str, keys: set[str], where: str | None) -> str:
    """Report one old key and return the new one; `keys` are those given at the same place."""
    new = RENAMED[old]
    if where is None:
        return new
    if new in keys:
        raise UserError(f"{where}: {old} is the old name of {new}, and both are given; remove {old}")
    warn(f"{where}: {old} is now called {new}; rename it, the next version rejects the old name")
    return new
