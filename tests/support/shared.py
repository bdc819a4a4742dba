"""Material that the workers of a test run share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of this test run; the first worker that needs it makes it, and the others wait.

    `make` gets the folder's path, and must let the folder appear only when it is complete.
    """
    base = factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = run / name
    with FileLock(run / f"{name}.lock"):
        if not folder.exists():
            make(folder)
    return folder
