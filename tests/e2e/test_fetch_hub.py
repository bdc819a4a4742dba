"""fetch from a hub, which is a small server on loopback."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitron_train.config import TeacherConfig
from minitron_train.fetch.teacher import fetch_teacher
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import exclusive
from tests.support.hub_server import BLOCK_BYTES, COMMIT, FILES, REPO, SHARD, teacher_config


def test_only_model_files_arrive_and_a_finished_folder_needs_no_network(hub, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    facts = fetch_teacher(teacher_config(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "source.json"} == FILES
    assert {name for name, _ in hub.gets} == set(FILES) - {"LICENSE"}, "nothing else was even asked for"
    assert facts["commit"] == COMMIT and facts["license"] == "mit"
    assert facts["files"][SHARD] == hashlib.sha256(FILES[SHARD]).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"], "the download folder is gone"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch_teacher(teacher_config(), folder) == facts


def test_a_branch_is_recorded_as_its_commit_and_must_not_move(hub, tmp_path):
    teacher = teacher_config("refs/pr/4")
    teacher.commit = "bbbb"
    with pytest.raises(UserError, match=r"is now commit aaaa.*expects bbbb; look at what changed"):
        fetch_teacher(teacher, tmp_path / "teacher")
    teacher.commit = COMMIT[:7]
    assert fetch_teacher(teacher, tmp_path / "teacher")["commit"] == COMMIT
    teacher.commit = "bbbb"
    with pytest.raises(UserError, match="expects bbbb"):
        fetch_teacher(teacher, tmp_path / "teacher")


def test_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut_bytes = 18 * BLOCK_BYTES + 5
    with pytest.raises(UserError, match="the server refuses; try again later, what was downloaded is kept"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    hub.cut_bytes, hub.ill = None, False
    hub.gets.clear()
    fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert hub.gets == [(SHARD, 18 * BLOCK_BYTES)], "finished files are not asked for again"
    assert (tmp_path / "teacher" / SHARD).read_bytes() == FILES[SHARD]


@pytest.mark.races
def test_killed_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.pause_s = 0.1
    program = f"""
from pathlib import Path
from huggingface_hub import constants
from minitron_train.config import TeacherConfig
from minitron_train.fetch.teacher import fetch_teacher
constants.DOWNLOAD_CHUNK_SIZE = {BLOCK_BYTES}
fetch_teacher(TeacherConfig(source="hub", repo_id={REPO!r}, revision={COMMIT!r}), Path({str(tmp_path / "teacher")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    partial = tmp_path / "teacher.download" / f"{hashlib.sha256(FILES[SHARD]).hexdigest()}.incomplete"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.02)
    process.kill()
    process.wait()
    arrived = partial.stat().st_size
    assert 0 < arrived < len(FILES[SHARD])
    hub.pause_s = 0
    hub.gets.clear()
    fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert hub.gets == [(SHARD, arrived)]
    assert (tmp_path / "teacher" / SHARD).read_bytes() == FILES[SHARD]


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_content_that_is_not_what_the_hub_lists(hub, tmp_path, name):
    hub.contents[name] = hub.contents[name][:-1] + b"?"
    with pytest.raises(UserError, match=f"{name}: the content does not match the hub's listing"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    hub.contents[name] = FILES[name]
    fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert (tmp_path / "teacher" / name).read_bytes() == FILES[name]


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "GatedRepo", "accept a licence.*HF_TOKEN"),
        (404, "RepoNotFound", "check teacher.repo_id"),
        (404, "RevisionNotFound", "check teacher.revision"),
        (500, "", "try again later"),
    ],
)
def test_refusals_name_the_remedy(hub, tmp_path, status, code, remedy):
    hub.refusal = (status, code)
    with pytest.raises(UserError, match=remedy) as caught:
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_network_and_offline_mode(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="check the network or set HF_ENDPOINT"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert list(tmp_path.iterdir()) == []


def test_a_repository_without_safetensors(hub, tmp_path):
    hub.listed = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")


def test_two_fetches_do_not_append_to_one_file(hub, tmp_path):
    staging = tmp_path / "teacher.download"
    with exclusive(staging / "lock", staging), pytest.raises(UserError, match="another process is at work in"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")


def test_a_source_without_what_it_needs():
    with pytest.raises(UserError, match=r"teacher\.revision.*teacher\.source=hub needs it"):
        TeacherConfig(source="hub", repo_id=REPO).validate()
    with pytest.raises(UserError, match=r"teacher\.source=ftp"):
        TeacherConfig(source="ftp").validate()
