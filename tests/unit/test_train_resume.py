"""Training runs that are interrupted: the same losses; data and processes that fail under them."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minitron_train.config import DataConfig, Precision, SourceConfig, SourceKind
from minitron_train.data.ledger import DATA_FILES, check_data_files
from minitron_train.data.prefetch import AHEAD
from minitron_train.runtime.errors import MachineError, UserError
from tests.support import training
from tests.support.training import Material, before_step, interrupt, make_material

NUM_STEPS = 16
SMALL_STEP = {"train__global_batch_size": 4, "train__micro_batch_size": 4}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"))


def data_set(folder: Path) -> dict[str, Any]:
    """Settings for a data set in the hub's form, about 1200 tokens in two shards, which the steps read more than once."""
    folder.mkdir()
    for shard in range(2):
        rows = [f"{shard}.{i} " + "some plain words " * (5 + i) for i in range(7)]
        pyarrow.parquet.write_table(
            pyarrow.table({"text": rows}), folder / f"train-{shard:05d}-of-00002.parquet", row_group_size=3
        )
    return {"data__path": None, "data__sources": {"own": SourceConfig(path=str(folder), kind=SourceKind.hub)}}


def test_losses_of_an_interrupted_run(material, tmp_path, monkeypatch, capsys):
    """Broken off at random steps, twice at one of them: every figure of every step equals the uninterrupted run's."""
    monkeypatch.setattr("minitron_train.data.feed.UNIT_BYTES", 1000)
    settings: dict[str, Any] = {
        "checkpoint__interval_steps": 1,
        "train__num_tokens": NUM_STEPS * 4 * training.SEQ_LENGTH,
    }
    settings |= data_set(tmp_path / "data") | SMALL_STEP | {"data__validation_path": str(material.corpus)}
    facts = training.run(material, tmp_path / "whole", **settings)
    assert facts["data_passes"]["own"]["passes"] > 1
    stops = sorted(random.Random(5).sample(range(2, NUM_STEPS), 2))
    for step in [*stops, stops[-1]]:
        with before_step(step, interrupt), pytest.raises(training.Interrupted):
            training.run(material, tmp_path / "broken", **settings)
    training.run(material, tmp_path / "broken", **settings)
    assert training.rows(tmp_path / "broken") == training.rows(tmp_path / "whole")
    said = capsys.readouterr().out
    assert f"own {facts['data_passes']['own']['passes']:.1f} passes over" in said and "own: pass 2 begins" in said


def test_losses_with_late_weights_and_other_workers(material, tmp_path, monkeypatch):
    """Two JSONL parts, the weights of which change in the second half: resumed with 2 workers, then with 1, around the
    change, the losses are those of an uninterrupted run without any.
    """
    monkeypatch.setattr("minitron_train.data.feed.UNIT_BYTES", 1000)
    parts = {}
    for name, weights in {"first": (1.0, 0.2), "late": (0.0, 0.8)}.items():
        rows = [json.dumps({"text": f"{name} {i} " + "some plain words " * (5 + i)}) for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        weight, late_weight = weights
        parts[name] = SourceConfig(path=str(tmp_path / f"{name}.jsonl"), weight=weight, late_weight=late_weight)
    settings: dict[str, Any] = SMALL_STEP | {
        "data__path": None,
        "data__sources": parts,
        "data__late_fraction": 0.5,
        "data__validation_path": str(material.corpus),
        "checkpoint__interval_steps": 1,
    }
    training.run(material, tmp_path / "whole", **settings)
    for step, num_workers in ((3, 2), (10, 1)):  # the change comes after 8 of 16 steps
        with before_step(step, interrupt), pytest.raises(training.Interrupted):
            training.run(material, tmp_path / "broken", **settings, data__num_workers=num_workers)
    assert training.run(material, tmp_path / "broken", **settings, data__num_workers=2)["resumed_at_step"] == 9
    assert training.rows(tmp_path / "broken") == training.rows(tmp_path / "whole")


def test_a_worker_killed_under_a_run(material, tmp_path):
    """One line, and the next start goes on from the last checkpoint with the uninterrupted run's losses.

    At the kill in step 3, batches 4 and 5 are ready and batch 6 is not. The checkpoint of step 4 may still be in progress.
    """
    settings: dict[str, Any] = {"data__num_workers": 1, "checkpoint__interval_steps": 2}
    training.run(material, tmp_path / "whole", **settings)

    def kill(trainer: Any) -> None:
        trainer.checkpoints.poll(wait=True)
        stream = trainer.stream.stream
        while trainer.stream.made.qsize() < AHEAD:
            time.sleep(0.01)
        (worker,) = stream.feed.pool.workers
        os.kill(worker.process.pid, signal.SIGKILL)
        stream.packers[0].taken = len(stream.packers[0].order)  # the next batch needs the next unit

    line = r"^data.num_workers: tokenising process \d+ was killed by SIGKILL .*; start again to resume at the last"
    with before_step(3, kill), pytest.raises(MachineError, match=line):
        training.run(material, tmp_path / "killed", **settings)
    assert training.run(material, tmp_path / "killed", **settings)["resumed_at_step"] in (2, 4)
    assert training.rows(tmp_path / "killed") == training.rows(tmp_path / "whole")


def test_a_changed_file_is_named_at_the_next_start(material, tmp_path):
    """data_files.json names what was rewritten with the same size, and lets a corpus move."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(material.corpus.read_text())
    folder = tmp_path / "run"
    with before_step(5, interrupt), pytest.raises(training.Interrupted):
        training.run(material, folder, data__path=str(corpus))
    (record,) = json.loads((folder / DATA_FILES).read_text())
    assert record["path"] == str(corpus) and record["size_bytes"] == corpus.stat().st_size and record["is_whole"]
    (tmp_path / "moved").mkdir()
    corpus.rename(tmp_path / "moved/corpus.txt")
    check_data_files(folder, DataConfig(path=str(tmp_path / "moved/corpus.txt")))
    corpus.write_text(material.corpus.read_text().replace("argument", "ARGUMENT"))
    with pytest.raises(
        UserError, match=f"started with different data .{corpus} was rewritten with the same size.; restore"
    ):
        check_data_files(folder, DataConfig(path=str(corpus)))
    with pytest.raises(UserError, match="differ from the checkpoint's"):
        training.run(material, folder, data__path=str(corpus))
    (folder / DATA_FILES).write_text("[{]")
    with pytest.raises(UserError, match=f"{DATA_FILES}: damaged .*; remove it"):
        check_data_files(folder, DataConfig(path=str(corpus)))


def test_an_interrupted_run_in_bf16(tmp_path):
    """The fp32 master weights and moments are restored exactly: every figure of every step equals the uninterrupted run's."""
    (tmp_path / "llama").mkdir()
    llama = make_material(tmp_path / "llama", family="llama")
    settings: dict[str, Any] = SMALL_STEP | {"train__precision": Precision.bf16, "checkpoint__interval_steps": 2}
    training.run(llama, tmp_path / "whole", **settings)
    with before_step(6, interrupt), pytest.raises(training.Interrupted):
        training.run(llama, tmp_path / "broken", **settings)
    training.run(llama, tmp_path / "broken", **settings)
    assert training.rows(tmp_path / "broken") == training.rows(tmp_path / "whole")
