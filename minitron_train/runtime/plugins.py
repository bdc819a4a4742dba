"""A user's own code, named in the settings as my_lab.module or my_lab.module.name and imported from PYTHONPATH.

Only names that the user wrote into a setting are imported; nothing in a model's or a data folder ever is.
"""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import sha256_file

DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def import_module(key: str, name: str) -> ModuleType:
    """The module `name`.

    Raises:
        UserError: it is no module's name, or cannot be imported; the line begins with `key`, the setting.
    """
    if not DOTTED.fullmatch(name):
        raise UserError(f"{key}={name}: is not the name of a Python module; write it with dots, like my_lab.taylor")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = "its folder must be the working directory or on PYTHONPATH"
        raise UserError(f"{key}={name}: cannot be imported ({first_line(error)}); {remedy}") from error


def import_name(key: str, name: str) -> Any:
    """The object `name` of a module, like my_lab.losses.focal.

    Raises:
        UserError: there is no such module, or nothing callable of that name in it.
    """
    path, _, attribute = name.rpartition(".")
    if not path:
        raise UserError(f"{key}={name}: names no module; write my_package.module.function")
    found = getattr(import_module(key, path), attribute, None)
    if not callable(found):
        raise UserError(f"{key}={name}: {path} defines nothing callable of the name {attribute}; correct the name")
    return found


def code_hash(plugin: Any) -> str:
    """sha256 of the file that defines a module or function: what it decided is done again when the code changes."""
    return sha256_file(Path(inspect.getfile(plugin)))
