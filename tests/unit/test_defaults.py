"""One default: the dataclasses hold it, files of conf/ only differ from it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_train.commands import configuration
from minitron_train.config import Config
from minitron_train.data.sources import blend

CONF = Path(__file__).parents[2] / "conf"
RECORDS = ("model/", "prune/paper", "prune/modelopt")  # flat records of something published, read as a whole


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def test_no_recipe_gives_the_dataclasses_defaults() -> None:
    composed = configuration.compose([])
    assert composed.output_dir == "outputs/custom"  # Config() keeps the interpolation
    assert blend(composed.data) == blend(Config().data)  # named in conf/data, so that a part can be changed by its key
    composed.output_dir, composed.data.sources = Config().output_dir, {}
    assert flat(dataclasses.asdict(composed)) == flat(dataclasses.asdict(Config()))


@pytest.mark.parametrize("file", sorted(CONF.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_presets_hold_what_differs(file: Path) -> None:
    name, section = f"{file.parent.name}/{file.stem}", getattr(Config(), file.parent.name)
    if name.startswith(RECORDS):
        return
    for key, value in (yaml.safe_load(file.read_text()) or {}).items():
        assert value != getattr(section, key), f"{name}: {key} repeats the default"


@pytest.mark.parametrize("preset", ["paper", "modelopt"])
def test_published_rankings_cut_without_repair(preset: str) -> None:
    prune = configuration.compose([f"prune={preset}"]).prune
    assert not prune.rotate and not prune.repairs
