"""Stages: done once, done again when something changed, never damaged by a failure."""

import errno
import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import exclusive
from minitron_train.stages import Invocation, Stage, exported, note_export, read_provenance, run_stage
from minitron_train.stages.stage import short

INVOCATION = Invocation(["python", "-m", "minitron_train", "test"], {"seed": 1})


def run(stage: Stage, text: str = "done", force: bool = False, fail: bool = False) -> bool:
    def work(folder: Path) -> Mapping[str, Any]:
        (folder / "result").write_text(text)
        if fail:
            raise RuntimeError
        return {"answer": 42}

    return run_stage(stage, INVOCATION, work, force=force, on_rank0=lambda begun: begun())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(
        name="prune", folder=tmp_path / "out", inputs={"teacher": "abc"}, settings={"student": {"hidden_size": 8}}
    )


def test_a_finished_stage_is_not_done_twice(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stage)
    assert not run(stage, "again")
    assert "already finished" in capsys.readouterr().out
    assert (stage.folder / "result").read_text() == "done"
    assert run(stage, "forced", force=True)
    assert (stage.folder / "result").read_text() == "forced"


def test_provenance_says_how_it_came_about(stage: Stage) -> None:
    run(stage)
    record = read_provenance(stage.folder)
    assert record is not None
    assert record["stage"] == "prune"
    assert record["command"] == "python -m minitron_train test"
    assert record["inputs"] == {"teacher": "abc"}
    assert record["facts"] == {"answer": 42}
    assert record["peak_rss_bytes"] > 0
    assert record["packages"]["torch"].startswith("2.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"teacher": "xyz"}}, "input teacher was abc, is xyz"),
        ({"settings": {"student": {"hidden_size": 4}}}, "student.hidden_size was 8, is 4"),
    ],
)
def test_a_change_makes_it_stale_and_is_said(
    stage: Stage, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    run(stage)
    assert run(replace(stage, **change), "new")
    assert f"stale ({message})" in capsys.readouterr().out
    assert (stage.folder / "result").read_text() == "new"


def test_values_are_shortened_where_they_are_digests_alone() -> None:
    """Two steps of one training differ after more than 12 characters, and so may two end tokens."""
    digest = "ab" * 32
    assert short(digest) == digest[:12]
    assert short(f"step_00000040:{digest}") == f"step_00000040:{digest[:12]}"
    assert short("<|endoftext|>.jsonl") == "<|endoftext|>.jsonl"
    assert short(hashlib.sha256().hexdigest()) == "nothing"


def test_the_blend_is_one_line_of_a_dry_run(stage: Stage) -> None:
    inputs = {"data prose": "ab" * 32, "data prose weight": "0.7", "teacher": "cd" * 32}
    reads = [line.strip() for line in replace(stage, inputs=inputs).describe() if line.startswith("  reads")]
    assert reads == ["reads   teacher cdcdcdcdcdcd", "reads   data: prose abababababab, prose weight 0.7"]


def test_a_failed_second_run_keeps_the_first(stage: Stage) -> None:
    run(stage)
    with pytest.raises(RuntimeError):
        run(stage, "half", force=True, fail=True)
    assert (stage.folder / "result").read_text() == "done"
    assert stage.state() == ("finished", "")


def test_reading_a_state_leaves_the_work_of_another_process(stage: Stage) -> None:
    """As dry_run=true does beside a running command."""
    scratch = stage.folder.with_name("out.partial-12345678")
    scratch.mkdir()
    assert stage.state() == ("missing", "")
    assert scratch.exists()
    run(stage)
    assert not scratch.exists(), "of a killed run, for nobody holds the lock"


def test_a_folder_that_was_being_replaced_is_read_and_put_back(stage: Stage) -> None:
    run(stage)
    stage.folder.rename(stage.folder.with_name("out.replaced"))
    assert stage.state() == ("finished", "")
    assert not run(stage, "again")
    assert (stage.folder / "result").read_text() == "done"


def test_what_a_killed_second_run_left_of_a_finished_stage_goes(stage: Stage) -> None:
    run(stage)
    (stage.folder / "README.md.partial-12345678").touch()
    stage.folder.with_name("out.partial-12345678").mkdir()
    stage.lock.touch()
    assert not run(stage, "not done")
    assert [path.name for path in stage.folder.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in stage.folder.iterdir()) == ["provenance.json", "result"]


@pytest.mark.parametrize("mode", ["atomic", "resumable", "self_managed"])
def test_a_second_process_is_refused(stage: Stage, mode: Any) -> None:
    stage = replace(stage, mode=mode)
    stage.folder.mkdir()
    with exclusive(stage.lock, stage.folder), pytest.raises(UserError, match=r"another process is at work in .*/out;"):
        run(stage)
    assert run(stage)
    assert not run(stage, "again")
    assert list(stage.folder.parent.iterdir()) == [stage.folder], "the lock's file is gone"


def test_a_killed_process_leaves_no_lock(stage: Stage) -> None:
    program = (
        "import sys, time; from pathlib import Path; from minitron_train.runtime.files import exclusive\n"
        "with exclusive(Path(sys.argv[1]), Path(sys.argv[2])): print(flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(stage.lock), str(stage.folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(UserError, match="another process"):
            run(stage)
        other.kill()
    assert stage.lock.exists() and run(stage)


def test_a_disk_without_locks_is_said_and_used(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run(stage)
    assert "out.lock: cannot be locked (No locks available); make sure" in capsys.readouterr().out


def test_a_growing_stage_goes_on_but_not_with_other_settings(stage: Stage) -> None:
    training = replace(stage, mode="resumable")
    with pytest.raises(RuntimeError):
        run(training, "step 5", fail=True)
    assert (training.folder / "result").read_text() == "step 5", "what has grown stays"
    with pytest.raises(UserError, match=r"student.hidden_size was 8, is 4"):
        run(replace(training, settings={"student": {"hidden_size": 4}}))
    assert run(training, "step 9")
    with pytest.raises(UserError, match="force=true"):
        run(replace(training, inputs={"teacher": "xyz"}))


def refused(stage: Stage, *, force: bool = False, files: tuple[str, ...] = ()) -> None:
    """A run whose work is refused, after it has written some files."""

    def work(folder: Path) -> Mapping[str, Any]:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("1")
        raise UserError("train.global_batch_size=7: must be a multiple")

    with pytest.raises(UserError, match="global_batch_size"):
        run_stage(stage, INVOCATION, work, force=force, on_rank0=lambda begun: begun())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("mode", ["atomic", "resumable"])
def test_files_of_others_are_not_touched(stage: Stage, mode: Any, force: bool) -> None:
    """A corpus in OUTPUT_DIR/train, models beside export.path's, a teacher that was copied there."""
    stage = replace(stage, mode=mode)
    for name in ("corpus.jsonl", "provenance.json/x", "checkpoints/step_9/weights"):
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / name).write_text("precious")
    aside = stage.folder.with_name("out.replaced")
    aside.mkdir()
    before = sorted(stage.folder.parent.rglob("*"))
    with pytest.raises(
        UserError, match=r"prune: .*/out holds files that .* not write \(such as checkpoints\).*; move them"
    ):
        run(stage, force=force)
    with pytest.raises(UserError, match="holds files that"):
        stage.describe()
    assert sorted(stage.folder.parent.rglob("*")) == before


STARTED = '{"inputs": {"teacher": "abc"}, "settings": {"student": {"hidden_size": 8}}}'


@pytest.mark.parametrize(
    ("left", "text"),
    [
        ("started.json", STARTED),
        ("started.json.partial-12345678", "{"),
        ("", ""),
    ],
)
def test_what_own_runs_have_left_is_gone_on_with(stage: Stage, left: str, text: str) -> None:
    stage.folder.mkdir()
    if left:
        (stage.folder / left).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / left).write_text(text)
    for mode in ("resumable", "atomic"):
        assert run(replace(stage, mode=mode), mode)
        assert (stage.folder / "result").read_text() == mode
        (stage.folder / "provenance.json").unlink()
        (stage.folder / "started.json").write_text(STARTED)


@pytest.mark.parametrize("mode", ["atomic", "resumable"])
@pytest.mark.parametrize("name", ["provenance.json", "started.json"])
def test_a_damaged_record_is_named_and_its_work_kept(stage: Stage, mode: Any, name: str) -> None:
    """Only force=true replaces what was done: the rest of the folder may have cost days."""
    stage = replace(stage, mode=mode)
    run(stage)
    (stage.folder / "provenance.json").unlink()
    (stage.folder / "started.json").write_text(STARTED)
    (stage.folder / name).write_text("{")
    if (mode, name) != ("atomic", "started.json"):  # only a training has one
        with pytest.raises(UserError, match=rf"{name}: damaged \(.+\); restore it from a copy, .*force=true"):
            run(stage, "again")
        assert (stage.folder / "result").read_text() == "done"
    assert run(stage, "forced", force=True)
    assert (stage.folder / "result").read_text() == "forced"


def test_downloads_look_for_themselves(stage: Stage) -> None:
    stage.folder.mkdir()
    (stage.folder / "teacher.provenance.json").touch()
    assert run(replace(stage, mode="self_managed", record="student.provenance.json"))


def test_a_file_in_the_place_of_the_folder_is_kept(stage: Stage) -> None:
    stage.folder.write_text("model")
    with pytest.raises(UserError, match="is a file, not a folder"):
        run(stage)
    assert stage.folder.read_text() == "model"


def test_training_that_is_refused_before_its_first_step(stage: Stage) -> None:
    training = replace(stage, mode="resumable")
    refused(training, files=("metrics.jsonl.tmp", "wandb/run"))
    assert not training.folder.exists(), "nothing was there before"
    training.folder.mkdir()
    (training.folder / "started.json").write_text(STARTED)
    (training.folder / "notes.txt").write_text("mine")
    refused(training)
    assert (training.folder / "notes.txt").read_text() == "mine", "an earlier run had begun it"
    refused(training, force=True, files=("metrics.jsonl",))
    assert (training.folder / "metrics.jsonl").exists(), "it had begun"


def checkpoint(folder: Path, text: str) -> None:
    """What a save leaves of use here."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text(text)


@pytest.fixture
def trained(stage: Stage) -> Stage:
    """A training that is finished."""
    training = replace(stage, mode="resumable")
    training.folder.mkdir()
    (training.folder / "started.json").write_text(STARTED)
    checkpoint(training.folder, "old")
    run(training)
    return training


@pytest.mark.parametrize("error", [UserError, RuntimeError, KeyboardInterrupt])
def test_a_forced_training_that_fails_before_its_first_checkpoint_costs_nothing(
    trained: Stage, error: type[BaseException]
) -> None:
    def work(folder: Path) -> Mapping[str, Any]:
        assert sorted(path.name for path in folder.iterdir()) == ["started.json"], "a folder of its own"
        (folder / "metrics.jsonl").write_text("{}")
        raise error("no data")

    with pytest.raises(error):
        run_stage(trained, INVOCATION, work, force=True, on_rank0=lambda begun: begun())
    assert [path.name for path in trained.folder.parent.iterdir()] == ["out"]
    assert not run(trained, "again") and (trained.folder / "checkpoints" / "latest").read_text() == "old"


@pytest.mark.parametrize("saved", [False, True])
def test_a_forced_training_that_is_killed(trained: Stage, saved: bool) -> None:
    """Before its first checkpoint the next start finds the earlier run, after it the new one."""
    aside = trained.folder.with_name("out.replaced")
    trained.folder.rename(aside)
    trained.folder.mkdir()
    (trained.folder / "started.json").write_text(STARTED)
    if saved:
        checkpoint(trained.folder, "new")
    assert run(trained, "again") is saved
    assert (trained.folder / "checkpoints" / "latest").read_text() == ("new" if saved else "old")
    assert not aside.exists()


def test_a_forced_training_that_was_stopped_before_its_first_checkpoint_begins_anew(
    trained: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job script looks for the mark, and gives force=true again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def stop(folder: Path) -> Mapping[str, Any]:
        (folder / "stopped.json").touch()
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        run_stage(trained, INVOCATION, stop, force=True, on_rank0=lambda begun: begun())
    assert (trained.folder / "stopped.json").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(trained, "new", force=True)
    assert not (trained.folder / "stopped.json").exists() and (trained.folder / "result").read_text() == "new"
    assert [path.name for path in trained.folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("mode", ["atomic", "resumable"])
def test_a_requeued_job_obeys_force_once(
    stage: Stage, mode: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, resumes = replace(stage, mode=mode), mode == "resumable"

    def life(restarts: int, text: str, *, job: str = "7", fail: bool = False) -> bool:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        capsys.readouterr()
        return run(stage, text, force=True, fail=fail)

    run(stage, "old")
    assert life(1, "not reached before", job="6"), "that was another job's"
    with pytest.raises(RuntimeError):
        life(0, "half", fail=True)
    saved = stage.folder / "saved"
    if resumes:
        saved.touch()
    assert life(1, "whole")
    assert saved.exists() is resumes and ("this job began it" in capsys.readouterr().out) is resumes
    assert not life(2, "again") and (stage.folder / "result").read_text() == "whole"
    assert life(0, "typed again in the same job")


def test_another_stages_result_is_not_replaced(stage: Stage) -> None:
    run(stage)
    export = replace(stage, name="export", inputs={"checkpoint": "step"})
    for force in (False, True):
        with pytest.raises(UserError, match=r"export: .* holds the result of another stage \(prune\)"):
            run(export, force=force)
    assert (stage.folder / "result").read_text() == "done"


def test_a_student_that_was_exported_elsewhere_is_found(tmp_path: Path) -> None:
    """The last export counts; OUTPUT_DIR/student needs no record, and a student that has gone is not named."""
    out, one, two = (tmp_path / name for name in ("out", "one", "two"))
    for folder in (out, one, two):
        folder.mkdir()
        (folder / "config.json").touch()
    assert exported(out) is None
    for folder in (one, two):
        note_export(out, folder)
        assert exported(out) == folder
    (two / "config.json").unlink()
    assert exported(out) is None
    note_export(out, out / "student")
    assert not (out / "exported.json").exists()
