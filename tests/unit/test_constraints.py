"""The constraints files: one for each supported Python, with pins that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.11", "3.12", "3.13"]
BY_PYTHON = {"megatron-core"}  # pinned to another release on each Python


def pins(python: str) -> dict[str, str]:
    """The pinned version of each package."""
    lines = (ROOT / "constraints" / f"{python}.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_supported_pythons() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(9, 20) if f"3.{minor}.1" in allowed] == PYTHONS
    assert {path.stem for path in (ROOT / "constraints").iterdir()} == set(PYTHONS)
    offered = re.search(r"for v in ([\d. ]+);", (ROOT / "Makefile").read_text())
    assert offered and offered[1].split() == PYTHONS


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_allowed_and_complete(python: str) -> None:
    pinned = pins(python)
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_pins_differ_by_python_only_where_they_must() -> None:
    first, *others = (pins(python).items() - {(name, pins(python)[name]) for name in BY_PYTHON} for python in PYTHONS)
    assert all(other == first for other in others)
