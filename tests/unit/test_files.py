"""Outputs appear whole or not at all."""

import errno
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minitron_train.hf.locate import check_folder
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import (
    PARTIAL,
    atomic_file,
    atomic_folder,
    atomic_write_json,
    disk_errors,
    recover,
    remove_folder,
    remove_scratch_files,
    why_no_folder,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as scratch:
        (scratch / "old").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as scratch:
        (scratch / "half").write_text("2")
        raise RuntimeError
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"old"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_reads_what_safetensors_writes(tmp_path: Path, umask: int, mode: int) -> None:
    other = tmp_path / "of somebody else"
    other.touch(0o600)
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out") as scratch:
            (scratch / "a").mkdir()
            save_file({"x": np.ones(1)}, scratch / "a" / "model.safetensors")
            (scratch / "link").symlink_to(other)
            os.link(other, scratch / "second name")
        with atomic_file(tmp_path / "one.safetensors") as scratch:
            save_file({"x": np.ones(1)}, scratch)
    finally:
        os.umask(before)
    for file in (tmp_path / "out" / "a" / "model.safetensors", tmp_path / "one.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == mode
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta-llama/Llama-3.1-8B", "set teacher.source=hub teacher.repo_id=meta-llama/Llama-3.1-8B teacher.revision"),
        ("model/config.json", "is a file; give its folder, model"),
        ("model/tiny.Q4_0.gguf", "is a GGUF file, which is quantised"),
        ("model/none", "no such folder; give a Hugging Face folder"),
        ("none", "no such folder; give a Hugging Face folder"),
    ],
)
def test_what_is_given_for_a_folder_is_named(tmp_path: Path, monkeypatch, name: str, message: str) -> None:
    (tmp_path / "model").mkdir()
    for file in ("config.json", "tiny.Q4_0.gguf"):
        (tmp_path / "model" / file).touch()
    monkeypatch.chdir(tmp_path)
    assert message in why_no_folder(Path(name))
    with pytest.raises(UserError, match=re.escape(message)):
        check_folder(Path(name))


def test_a_new_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "out") as scratch:
            (scratch / name).write_text("1")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"new"}


def test_recover_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    """The old folder was moved aside, the new one is not yet there: the old one comes back, half work goes."""
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.partial-12345678").mkdir()
    recover(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_recover_after_a_kill_before_the_old_folder_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "new").touch()
    (tmp_path / "out.replaced").mkdir()
    recover(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"new"}


def test_a_kill_while_a_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither finished nor somebody else's: the record goes first, the mark of a begun run last."""
    folder, gone = tmp_path / "train", []
    (folder / "checkpoints" / "step").mkdir(parents=True)
    for name in ("a", "provenance.json", "started.json", "z"):
        (folder / name).touch()
    unlink, rmtree = Path.unlink, shutil.rmtree
    monkeypatch.setattr(Path, "unlink", lambda path: (gone.append(path.name), unlink(path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (gone.append(path.name), rmtree(path)))
    remove_folder(folder, first="provenance.json", last="started.json")
    assert gone[0] == "provenance.json" and gone[-1] == "started.json" and len(gone) == 5
    assert not folder.exists()


def test_of_a_link_to_a_folder_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real" / "in").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "real" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "train").symlink_to(tmp_path / "real")
    remove_folder(tmp_path / "train", first="", last="")
    assert names(tmp_path) == {"real", "train", "other"} and not names(tmp_path / "real")


def test_a_scratch_file_goes_unless_a_living_process_writes_it(tmp_path: Path) -> None:
    """A kill leaves one: the next write of the same file deletes it, and so does `recover` of the folder around it."""
    for name in ("a.json", "ab.json", "a(1).json"):
        (tmp_path / f"{name}{PARTIAL}12345678").touch()
    atomic_write_json(tmp_path / "a.json", 1)
    assert names(tmp_path) == {"a.json", f"ab.json{PARTIAL}12345678", f"a(1).json{PARTIAL}12345678"}
    with atomic_file(tmp_path / "b.json") as scratch:
        scratch.write_text("2")
        atomic_write_json(tmp_path / "b.json", 1)
        remove_scratch_files(tmp_path)
    assert names(tmp_path) == {"a.json", "b.json"} and (tmp_path / "b.json").read_text() == "2"


def test_json_refuses_nan_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another output_dir"), atomic_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    full = Path("/dev/full")
    with pytest.raises(UserError, match="the disk is full"), atomic_folder(tmp_path / "out") as scratch:
        (scratch / "x").touch()
        full.write_bytes(b"0" * 10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("refused", "is_ours"), [("teacher/shard", False), ("out2", False), ("", True), ("out/x", True)]
)
def test_only_refusals_to_write_are_taken_for_such(tmp_path: Path, refused: str, is_ours: bool) -> None:
    """A file that may not be read is no reason to choose another output_dir."""
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / refused))
    with pytest.raises(UserError if is_ours else PermissionError), disk_errors(tmp_path / "out"):
        raise error
    with pytest.raises(UserError, match="cannot write"), atomic_folder(tmp_path / "out") as scratch:
        (scratch / "file").touch()
        (scratch / "file" / "below").touch()


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/minitron_out")  # root may write everywhere but here
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "out"
    with pytest.raises((UserError, FileNotFoundError)), atomic_folder(target):
        pass
