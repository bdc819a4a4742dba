"""docs/prune_and_look.ipynb: its cells run in order, and give outputs of the kinds that the file shows."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebook import run_cells

FILE = Path(__file__).parents[2] / "docs" / "prune_and_look.ipynb"


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def kinds(outputs: list[dict[str, Any]]) -> list[list[str]]:
    return [sorted(output.get("data", {"stdout": ""})) for output in outputs]


def test_every_cell_runs(notebook: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FILE.parents[1]))
    shown = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = run_cells(notebook)
    assert [kinds(outputs) for outputs in found] == [kinds(outputs) for outputs in shown]
    pictures = [
        output["data"]["image/svg+xml"] for outputs in found for output in outputs if "image" in str(kinds(outputs))
    ]
    for picture in pictures:
        assert ET.fromstring("".join(picture)).tag.endswith("svg")
    heads = next("".join(picture) for picture in pictures if "Attention heads" in "".join(picture))
    assert heads.count(", kept</title>") == heads.count(", cut</title>") == 24


def test_the_file_is_small_and_shows_pictures(notebook: dict[str, Any]) -> None:
    assert FILE.stat().st_size < 200_000
    assert "image/svg+xml" in str(notebook["cells"])
    assert {"nbformat", "nbformat_minor", "metadata", "cells"} == notebook.keys()
