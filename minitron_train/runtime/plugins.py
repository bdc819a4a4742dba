"""Plug-ins: a user's own code, named in a setting as my_lab.module or my_lab.module.name, imported from PYTHONPATH.

Only names in a setting are imported, never code from a model or data folder.
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
    """Import the module `name`.

    Args:
        key: the setting, for messages.

    Raises:
        UserError: `name` is not the name of a module, or cannot be imported.
    """
    if not DOTTED.fullmatch(name):
        raise UserError(f"{key}={name}: is not the name of a Python module; write it with dots, like my_lab.taylor")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = "add its folder to PYTHONPATH"
        raise UserError(f"{key}={name}: cannot be imported ({first_line(error)}); {remedy}") from error


def import_name(key: str, name: str) -> Any:
    """Import a function or class, such as my_lab.losses.focal.

    Raises:
        UserError: there is no such module, or it has nothing callable of that name.
    """
    path, _, attribute = name.rpartition(".")
    if not path:
        raise UserError(f"{key}={name}: names no module; write my_package.module.function")
    found = getattr(import_module(key, path), attribute, None)
    if not callable(found):
        raise UserError(f"{key}={name}: {path} defines no function or class {attribute}; correct the name")
    return found


def code_hash(plugin: Any) -> str:
    """sha256 of the file that defines a module or function. It is an input of a stage: changed code makes it stale."""
    return sha256_file(Path(inspect.getfile(plugin)))
