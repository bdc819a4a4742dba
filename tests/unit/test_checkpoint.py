"""Checkpoints: what is continued is bit-equal, what is damaged is passed over, what does not fit is refused."""

import contextlib
import functools
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from minitron_train.config import CheckpointConfig, Config, OnNonFinite
from minitron_train.evaluation.source import open_origin
from minitron_train.hf import HFFolder
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import PARTIAL, REPLACED, sha256_file
from minitron_train.train import assemble
from minitron_train.train import checkpoint_files as files
from minitron_train.train.best import BestMetric
from minitron_train.train.checkpoint import copy_to_host
from minitron_train.train.export import (
    SavedTensors,
    VerifiedCheckpoint,
    default_dtype,
    export_checkpoint,
    find_checkpoint,
)
from minitron_train.train.run import exit_to_resume
from tests.support.training import (
    NUM_STEPS,
    Interrupted,
    Material,
    before_step,
    interrupt,
    make_material,
    rows,
    run,
    student_of,
)


@pytest.fixture(scope="module")
def uninterrupted(training: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(training, folder, checkpoint__keep=5)
    return folder


@pytest.fixture
def broken_off(training: Material, tmp_path: Path) -> Path:
    """A run that ended in step 8, with checkpoints of steps 3 and 6."""
    with before_step(8, interrupt), pytest.raises(Interrupted):
        run(training, tmp_path)
    assert [path.name for path in files.finished(tmp_path / "checkpoints")] == ["step_00000006", "step_00000003"]
    return tmp_path


def test_resume_is_bit_equal(training: Material, uninterrupted: Path, broken_off: Path, tmp_path: Path) -> None:
    facts = run(training, broken_off)
    assert facts["resumed_at_step"] == 6
    assert rows(broken_off) == rows(uninterrupted)
    wanted, found = student_of(uninterrupted, tmp_path / "a"), student_of(broken_off, tmp_path / "b")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_finished_run_is_not_trained_again(training: Material, uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert run(training, uninterrupted, checkpoint__keep=5)["resumed_at_step"] == NUM_STEPS
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def flip(file: Path) -> None:
    """One bit."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "bit": lambda path: flip(path / "__0_0.distcp"),
    "cut": lambda path: os.truncate(path / "__0_0.distcp", 1000),
    # megatron-core 0.19 writes no common.pt
    "missing": lambda path: next(filter(Path.exists, (path / "common.pt", path / "__0_0.distcp"))).unlink(),
    "manifest": lambda path: (path / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(
    training: Material, uninterrupted: Path, broken_off: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    DAMAGES[damage](broken_off / "checkpoints" / "step_00000006")
    assert run(training, broken_off)["resumed_at_step"] == 3
    assert "step_00000006 is damaged" in capsys.readouterr().out
    assert rows(broken_off) == rows(uninterrupted)


def test_damaged_checkpoints_take_no_places(training: Material, broken_off: Path) -> None:
    flip(broken_off / "checkpoints" / "step_00000006" / "__0_0.distcp")
    with before_step(6, interrupt), pytest.raises(Interrupted):
        run(training, broken_off, checkpoint__interval_steps=5, checkpoint__keep=1)
    assert [path.name for path in files.finished(broken_off / "checkpoints")] == ["step_00000005"]


def manifest(step: int, evaluation: dict[str, float | None] | None = None) -> dict[str, Any]:
    """The facts of a manifest."""
    return {"step": step, "belongs_to": {}, "evaluation": evaluation or {}}


def test_fall_back_removes_what_is_newer_and_names_the_best(tmp_path: Path) -> None:
    yardstick, settings = BestMetric("validation.kl"), CheckpointConfig(keep=9, keep_best=1)
    for step, kl in ((1, None), (2, 0.2), (3, 0.1)):
        scratch = tmp_path / f"step_{step:08d}.partial-x"
        scratch.mkdir()
        files.publish(scratch, files.checkpoint_path(tmp_path, step), manifest(step, {"validation.kl": kl}))
        files.remove_old(tmp_path, settings, yardstick)
    for newest, best in ((2, "step_00000002\n"), (1, None)):
        files.make_newest(files.checkpoint_path(tmp_path, newest), settings, yardstick)
        assert len(files.finished(tmp_path)) == newest
        assert (tmp_path / "latest").read_text() == f"step_{newest:08d}\n"
        assert (tmp_path / "best").exists() == bool(best) and (not best or (tmp_path / "best").read_text() == best)


def test_a_kill_between_the_last_save_and_its_tidying(tmp_path: Path) -> None:
    """The run that goes on from that checkpoint has no other save to come: `latest`, `best` and the rest are settled."""
    for step in (1, 2):
        scratch = tmp_path / f"step_{step:08d}.partial-x"
        scratch.mkdir()
        files.publish(scratch, files.checkpoint_path(tmp_path, step), manifest(step, {"validation.kl": 1 / step}))
    (tmp_path / "latest").write_text("step_00000001\n")
    settings = CheckpointConfig(keep=1, keep_best=1)
    files.make_newest(files.checkpoint_path(tmp_path, 2), settings, BestMetric("validation.kl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step_00000002"]
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "step_00000002\n"


def test_each_tensor_is_copied_once() -> None:
    """megatron-core has already copied views. What shares memory with the training is copied here."""
    live, copied_before = torch.ones(3), torch.ones(3)
    entries = [(None, live), (None, copied_before)]
    _, _, (_, copies) = copy_to_host(("", "", ([], entries)), {live.untyped_storage().data_ptr()})
    assert [copy.data_ptr() == tensor.data_ptr() for (_, copy), (_, tensor) in zip(copies, entries, strict=True)] == [
        False,
        True,
    ]


def test_no_whole_checkpoint_is_an_error(training: Material, broken_off: Path) -> None:
    for path in files.finished(broken_off / "checkpoints"):
        flip(path / "__0_0.distcp")
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        run(training, broken_off)


def test_checkpoint_of_other_settings_is_refused(training: Material, broken_off: Path) -> None:
    with pytest.raises(UserError, match=r"jsd_beta was 0.5, is 0.1.*lr was 0.003, is 0.1.*tokens was 2048, is 4096"):
        run(training, broken_off, train__lr=0.1, train__num_tokens=4096, distill__jsd_beta=0.1)


def test_what_may_change_between_restarts(training: Material, uninterrupted: Path, broken_off: Path) -> None:
    other = {"checkpoint__interval_steps": 2, "checkpoint__best_metric": "validation.loss", "data__num_workers": 1}
    other |= {"distill__token_chunk": 4, "train__micro_batch_size": 4, "train__on_non_finite": OnNonFinite.skip}
    run(training, broken_off, **other)
    for row, wanted in zip(rows(broken_off), rows(uninterrupted), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_exits(training: Material, uninterrupted: Path, tmp_path: Path, number: int) -> None:
    with before_step(5, lambda _: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as ended:
        run(training, tmp_path)
    assert ended.value.code == 0
    mark = json.loads((tmp_path / "stopped.json").read_text())
    assert mark == {"signal": signal.Signals(number).name, "step": 5, "num_steps": NUM_STEPS}
    assert signal.getsignal(number) is signal.SIG_DFL
    assert run(training, tmp_path)["resumed_at_step"] == 5
    assert not (tmp_path / "stopped.json").exists()
    assert rows(tmp_path) == rows(uninterrupted)


def test_a_signal_while_the_run_is_loaded(
    training: Material, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step: the mark is left, the code is 0, and the next start does the whole run."""
    with monkeypatch.context() as patch:
        make = assemble.load_model

        def signalled(*arguments: Any, **named: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return make(*arguments, **named)

        patch.setattr(assemble, "load_model", signalled)
        with pytest.raises(SystemExit) as ended:
            run(training, tmp_path)
    assert ended.value.code == 0 and not files.finished(tmp_path / "checkpoints")
    assert json.loads((tmp_path / "stopped.json").read_text()) == {
        "signal": "SIGTERM",
        "step": 0,
        "num_steps": NUM_STEPS,
    }
    run(training, tmp_path)
    assert rows(tmp_path) == rows(uninterrupted) and not (tmp_path / "stopped.json").exists()


@pytest.mark.parametrize(
    ("force", "again"), [(False, "start again to resume"), (True, "start again without force=true")]
)
def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], force: bool, again: str
) -> None:
    trainer: Any = MagicMock(num_steps=9, config=Config(force=force))
    trainer.state.step = 5
    with pytest.raises(SystemExit):
        exit_to_resume(trainer, "SIGTERM", tmp_path)
    assert f"SIGTERM: saved at step 5 of 9; {again}" in capsys.readouterr().out


def test_ctrl_c_ends_and_resumes(training: Material, uninterrupted: Path, tmp_path: Path) -> None:
    with before_step(5, lambda _: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        run(training, tmp_path)
    assert run(training, tmp_path)["resumed_at_step"] in (0, 3)  # the save of step 3 may have been under way
    assert rows(tmp_path) == rows(uninterrupted)


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Two functions: one makes every larger file fail, as a full disk does, the other lifts that again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = (num_bytes, limits[1])
    try:
        yield tuple(functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit) for limit in (soft, limits))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_the_earlier_checkpoint(
    training: Material, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    failed = pytest.raises(UserError, match="the last checkpoint could not be written")

    def fill_after_saving(trainer) -> None:
        trainer.checkpoints.poll(wait=True)
        fill()

    with file_size_limit(200_000) as (fill, _), before_step(5, fill_after_saving), failed:  # a checkpoint needs more
        run(training, tmp_path)
    said = capsys.readouterr().out
    assert "step_00000006 could not be written" in said
    assert "the last good one is step_00000003" in said
    assert not list((tmp_path / "checkpoints").glob("*.partial*"))
    assert run(training, tmp_path)["resumed_at_step"] == 3
    assert rows(tmp_path) == rows(uninterrupted)


def test_a_failed_save_does_not_spoil_the_last_one(
    training: Material, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def recover(trainer) -> None:  # step 7's writer has failed, which perhaps nobody has looked at
        if (writing := trainer.checkpoints.writing) is not None:
            writing.thread.join()
        lift()

    with file_size_limit(200_000) as (fill, lift), before_step(7, lambda _: fill()), before_step(8, recover):
        assert run(training, tmp_path, checkpoint__interval_steps=7)["steps"] == NUM_STEPS
    assert "step_00000007 could not be written" in capsys.readouterr().out
    assert [path.name for path in files.finished(tmp_path / "checkpoints")] == ["step_00000008"]


def test_what_the_first_rank_writes_at_once_is_tried_before(
    training: Material, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    failed = pytest.raises(UserError, match="the last checkpoint could not be written")
    with file_size_limit(8_000) as (fill, _), before_step(5, lambda _: fill()), failed:
        run(training, tmp_path, checkpoint__interval_steps=99)
    assert "File too large" in capsys.readouterr().out
    assert not list((tmp_path / "checkpoints").glob("*.partial*"))


def test_a_full_disk_after_the_rename(
    training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(path: Path, text: str) -> None:
        raise UserError(f"{path}: no room")

    monkeypatch.setattr(files, "atomic_write_text", full)
    with pytest.raises(UserError, match="the last checkpoint could not be written"):
        run(training, tmp_path, checkpoint__interval_steps=99)
    assert "latest: no room" in capsys.readouterr().out


def test_a_checkpoint_keeps_its_name_until_its_successor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any moment of a deletion must leave a whole checkpoint of the step."""
    path, rmtree = files.checkpoint_path(tmp_path, 1), files.shutil.rmtree

    def delete(doomed: Path, **how: Any) -> None:
        assert PARTIAL in doomed.name or REPLACED in doomed.name
        assert not doomed.exists() or path.exists()
        rmtree(doomed, **how)

    monkeypatch.setattr(files.shutil, "rmtree", delete)
    for text in ("before its evaluation", "after"):
        scratch = tmp_path / f"{path.name}{PARTIAL}x"
        scratch.mkdir()
        (scratch / "data").write_text(text)
        files.publish(scratch, path, manifest(1))
    assert (path / "data").read_text() == "after" and files.find_damage(path) is None
    assert sorted(found.name for found in tmp_path.iterdir()) == ["latest", path.name]


def test_a_kill_between_two_renames_loses_no_checkpoint(
    training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal puts off an evaluation; after it the step is saved once more, and that save's renames are cut in two."""
    settings: dict[str, Any] = {"eval__every_tokens": 1, "checkpoint__interval_steps": 5}
    settings |= {"checkpoint__keep": 1, "checkpoint__keep_best": 0}
    folder, rename = tmp_path / "checkpoints", Path.rename

    def killed(path: Path, target: Path) -> Path:
        if PARTIAL in path.name and target.name == "step_00000005":
            raise Interrupted
        return rename(path, target)

    with before_step(5, lambda _: os.kill(os.getpid(), signal.SIGUSR1)), pytest.raises(SystemExit):
        run(training, tmp_path, **settings)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Path, "rename", killed)
        run(training, tmp_path, **settings)
    assert not files.finished(folder)
    assert run(training, tmp_path, **settings)["resumed_at_step"] == 5
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "model", "step_00000008"]


def test_what_comes_back_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("step_00000001.replaced", "step_00000002.replaced", "step_00000002", "step_00000003", "step_00000004")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / files.MANIFEST).write_text(name)
    (tmp_path / "step_00000005.replaced").mkdir()  # without a manifest
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # killed before it
        files.remove(tmp_path / "step_00000003")
    files.recover(tmp_path)
    found = {path.name: (path / files.MANIFEST).read_text() for path in tmp_path.iterdir()}
    assert found == {"step_00000001": names[0], "step_00000002": names[2], "step_00000004": names[4]}


def test_no_room_is_seen_before_writing(
    training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("minitron_train.train.checkpoint.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free disk space and run again"):
        run(training, tmp_path)
    assert "has 1,000 bytes free" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "values"),
    [("validation.kl", [0.3, 0.1, None, 0.2, None]), ("hellaswag.acc_norm", [0.3, 0.5, None, 0.4, None])],
)
def test_newest_and_best_are_kept(tmp_path: Path, metric: str, values: list[float | None]) -> None:
    yardstick = BestMetric(metric)
    for step, value in enumerate(values, 1):
        scratch = tmp_path / f"step_{step:08d}.partial-x"
        scratch.mkdir()
        (scratch / "data").write_text(str(step))
        facts = manifest(step, {metric: value, "other.acc": step / 10})
        files.publish(scratch, files.checkpoint_path(tmp_path, step), facts)
        files.remove_old(tmp_path, CheckpointConfig(keep=2, keep_best=1), yardstick)
    assert [path.name for path in files.finished(tmp_path)] == ["step_00000005", "step_00000004", "step_00000002"]
    assert (tmp_path / "latest").read_text() == "step_00000005\n"
    assert (tmp_path / "best").read_text() == "step_00000002\n"
    assert files.find_damage(tmp_path / "step_00000002") is None
    (tmp_path / "step_00000004" / "manifest.json").write_text("{")
    files.remove_old(tmp_path, CheckpointConfig(keep=1, keep_best=1), yardstick)
    assert [path.name for path in files.finished(tmp_path)] == ["step_00000005", "step_00000002"]


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_export_of_an_untrained_student_is_the_student(tmp_path: Path, family: str) -> None:
    material = make_material(tmp_path, family)
    run(material, tmp_path / "train", train__lr=0.0, train__min_lr=0.0)
    found, wanted = student_of(tmp_path / "train", tmp_path / "out"), HFFolder(material.student)
    assert set(found) == set(wanted.sizes)
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted.read(name)), name
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_export_names_what_is_wrong(uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no training checkpoint"):
        find_checkpoint(tmp_path, tmp_path, trust_external=False)
    with pytest.raises(UserError, match=r"export.dtype=int8: must be one of float32"):
        export_checkpoint(VerifiedCheckpoint(uninterrupted / "checkpoints" / "step_00000008"), tmp_path, "int8")


def test_export_names_a_weight_beyond_the_range_of_its_type(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, read = VerifiedCheckpoint(uninterrupted / "checkpoints" / "step_00000008"), SavedTensors.read
    monkeypatch.setattr(SavedTensors, "read", lambda *where: read(*where) * 1e6)
    with pytest.raises(
        UserError, match=r"float16: tensor model\..*\.weight: holds .* but float16 ends at 6.55e\+04; set"
    ):
        export_checkpoint(saved, tmp_path, "float16")
    export_checkpoint(saved, tmp_path, "bfloat16")


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"dtype": "float64"}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": {"text": "float16"}}, "float32"),
        ({}, "float32"),
    ],
)
def test_export_writes_a_type_that_it_has(config: dict[str, Any], wanted: str) -> None:
    assert default_dtype(config) == wanted


def test_a_checkpoint_is_found_and_read_through_once(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = uninterrupted / "checkpoints"
    for source, step in ((uninterrupted, 8), (checkpoints / "best", 8), (checkpoints / "step_00000003", 3)):
        found = find_checkpoint(source, uninterrupted, trust_external=True)
        assert found.path == files.checkpoint_path(checkpoints, step)
    monkeypatch.delattr(files, "find_damage")  # what reads every byte
    saved = VerifiedCheckpoint(files.checkpoint_path(checkpoints, 8))
    assert open_origin(saved).identity == f"{saved.path.name}:{sha256_file(saved.path / files.MANIFEST)}"
    export_checkpoint(saved, tmp_path)
