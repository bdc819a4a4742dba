"""A teacher cache over ranks: written by any number of ranks, read by any other, with a vocabulary in shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_train.config import TeachKind
from minitron_train.distillation.cache_files import CacheReader, read_format
from tests.support.helpers import run_ranks
from tests.support.training import (
    Interrupted,
    Material,
    assert_equal,
    before_step,
    interrupt,
    rows,
    run,
    teach,
    train_here,
)

SPLIT = {"parallel__tensor_model_parallel_size": 2}
SETTINGS = {
    "hidden": {"teach__file_mib": 1e-3, "teach__kind": TeachKind.hidden},
    "samples": {"teach__file_mib": 1e-3, "teach__draws": 20},
}
NUM_ROWS, SEQ_LENGTH = 64, 32


def teach_here(rank: int, world_size: int, material: Material, folder: Path, settings: dict[str, Any]) -> None:
    teach(material, folder, **settings)


@pytest.fixture(scope="module")
def caches(training: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache of each kind, written by one rank."""
    root = tmp_path_factory.mktemp("caches")
    for kind, settings in SETTINGS.items():
        teach(training, root / kind, **settings)
    return {kind: root / kind for kind in SETTINGS}


@pytest.mark.parametrize("layout", [{}, SPLIT], ids=["dp2", "tp2"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_two_ranks_write_what_one_writes(
    training: Material, caches: dict[str, Path], tmp_path: Path, kind: str, layout: dict[str, Any]
) -> None:
    """Hidden states agree to rounding. Of the draws, those next to a border between two tokens may change."""
    run_ranks(teach_here, 2, training, tmp_path, SETTINGS[kind] | layout)
    format = read_format(tmp_path)
    assert format == read_format(caches[kind])
    one, two = (CacheReader.of(folder, "training", NUM_ROWS) for folder in (caches[kind], tmp_path))
    num_equal = 0
    for number in range(NUM_ROWS):
        first, second = one.row(number), two.row(number)
        assert first.digest == second.digest
        assert first.entropy == pytest.approx(second.entropy, rel=1e-5)
        if kind == "hidden":
            states = [np.frombuffer(row.payload, np.float32) for row in (first, second)]
            assert np.allclose(*states, atol=1e-4)
        num_equal += first.payload == second.payload
    assert kind == "hidden" or num_equal > 0.9 * NUM_ROWS


def test_two_ranks_train_like_one(training: Material, caches: dict[str, Path], tmp_path: Path) -> None:
    """DP 2 and TP 2 (with sequence parallelism) read the cache of one rank; a run goes on from DP 1 with DP 2."""
    wanted = {}
    for kind, cache in caches.items():
        run(training, tmp_path / f"one_{kind}", teacher__cache=str(cache))
        wanted[kind] = rows(tmp_path / f"one_{kind}")
        with before_step(5, interrupt), pytest.raises(Interrupted):
            run(training, tmp_path / f"dp1to2_{kind}", teacher__cache=str(cache))
    layouts: dict[str, dict[str, Any]] = {
        "dp2": {},
        "dp1to2": {},
        "tp2": SPLIT | {"parallel__sequence_parallel": True},
    }
    folders = {(name, kind): tmp_path / f"{name}_{kind}" for name in layouts for kind in caches}
    runs = [
        (training, folder, layouts[name] | {"teacher__cache": str(caches[kind])})
        for (name, kind), folder in folders.items()
    ]
    run_ranks(train_here, 2, runs)
    for (_, kind), folder in folders.items():
        assert_equal(folder, wanted[kind])
