"""fetch from a hub that lies: nothing outside the target folder is read or written, and every lie is one line."""

import hashlib
import json
import threading

import pytest

from minitron_train.config import TeacherConfig
from minitron_train.fetch.teacher import fetch_teacher
from minitron_train.runtime.errors import UserError
from tests.support.hub_server import BLOCK_BYTES, COMMIT, FILES, SHARD, Hub, teacher_config


def test_a_digest_is_never_a_path(hub, tmp_path):
    """A hostile hub names a local file as a digest; it was linked into the teacher's folder."""
    secret = tmp_path / "secret"
    secret.write_text("k")
    for digest in (str(secret), "../secret", "lock", "g" * 40, "A" * 40, "a" * 40 + "\n", "", None, 7):
        hub.lies = {"config.json": {"blobId": digest}}
        with pytest.raises(UserError, match=r"the entry of config\.json is wrong .*; check HF_ENDPOINT") as caught:
            fetch_teacher(teacher_config(), tmp_path / "out" / "teacher")
        assert "\n" not in str(caught.value)
    hub.lies = {SHARD: {"lfs": {"sha256": "../" + "a" * 61, "size": len(FILES[SHARD])}}}
    with pytest.raises(UserError, match="the entry of model-00002"):
        fetch_teacher(teacher_config(), tmp_path / "out" / "teacher")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"] and not hub.gets


@pytest.mark.parametrize("size", [-1, 2**60, 1.5, "9", None, True])
def test_a_size_is_a_number_of_bytes(hub, tmp_path, size):
    hub.lies = {"config.json": {"size": size}}
    with pytest.raises(UserError, match=r"the entry of config\.json is wrong"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["model\0.safetensors", "model\n.safetensors", "model\x1b[2J.safetensors", "LICENSE\\x", "LICENSE" * 50]
)
def test_a_name_that_is_no_file_name(hub, tmp_path, name):
    hub.listed[name] = b"x"
    with pytest.raises(UserError, match=r"lists a file named.*must be printable") as caught:
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_names_that_leave_the_folder_or_are_ours_are_not_taken(hub, tmp_path):
    for name in ("../config.json", "/etc/model.safetensors", "model/../../model.safetensors", "source.json", ".."):
        hub.listed[name] = b"x"
    facts = fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert set(facts["files"]) == set(FILES)


def test_a_name_listed_twice_or_in_two_spellings(hub, tmp_path):
    hub.listed["LICENSE.txt"] = hub.listed["LICENSE.TXT"] = b"x"
    with pytest.raises(UserError, match=r"lists 'LICENSE\.TXT' twice, or in two spellings"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")


@pytest.mark.parametrize(
    "answer",
    [b"<html>", b"[]", b"null", b'{"siblings": []}', b'{"sha": "../x", "siblings": []}', b"[" * 100_000, b"\xff{"]
    + [json.dumps({"sha": COMMIT, "siblings": siblings}).encode() for siblings in (None, [1], {}, "x")],
)
def test_an_answer_that_is_no_listing(hub, tmp_path, answer):
    hub.answer = answer
    with pytest.raises(UserError, match=r"the listing of someone/model: damaged .*; check HF_ENDPOINT") as caught:
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_licence_that_is_none_is_not_recorded(hub, tmp_path):
    """It goes into the student's model card."""
    listed = [
        {
            "rfilename": name,
            "size": len(content),
            "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        }
        for name, content in FILES.items()
    ]
    for number, licence in enumerate(("mit\nlibrary_name: evil", ["mit"], 7, None)):
        answer = {"sha": COMMIT, "siblings": listed, "cardData": {"license": licence}}
        hub.answer = json.dumps(answer).encode()
        assert fetch_teacher(teacher_config(), tmp_path / f"teacher{number}")["license"] is None


def test_content_longer_than_listed_stops(hub, tmp_path):
    hub.extra = bytes(10 * BLOCK_BYTES)
    for headers in ({}, {"Content-Length": str(len(FILES[SHARD]) + len(hub.extra)), "Content-Range": "bytes */*"}):
        hub.headers = headers
        with pytest.raises(UserError, match=f"{SHARD}: ") as caught:
            fetch_teacher(teacher_config(), tmp_path / "teacher")
        assert "\n" not in str(caught.value)
    digest = hashlib.sha256(FILES[SHARD]).hexdigest()
    partial = tmp_path / "teacher.download" / f"{digest}.incomplete"
    assert not partial.exists() or partial.stat().st_size <= len(FILES[SHARD])


def test_a_part_of_another_range_is_noticed(hub, tmp_path):
    """The server answers a range request with other bytes: the digest shows it, and the next fetch begins anew."""
    staging = tmp_path / "teacher.download"
    staging.mkdir()
    digest = hashlib.sha256(FILES[SHARD]).hexdigest()
    (staging / f"{digest}.incomplete").write_bytes(b"?" * 100)
    with pytest.raises(UserError, match="the content does not match the hub's listing"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert (tmp_path / "teacher" / SHARD).read_bytes() == FILES[SHARD]


def test_links_in_the_download_folder_are_refused(hub, tmp_path):
    outside, staging = tmp_path / "outside", tmp_path / "teacher.download"
    outside.mkdir()
    (outside / "notes").write_text("mine")
    staging.symlink_to(outside)
    with pytest.raises(UserError, match=r"teacher\.download: is not a folder; remove it"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    staging.unlink()
    staging.mkdir()
    digest = hashlib.sha256(FILES[SHARD]).hexdigest()
    for name in ("lock", digest, f"{digest}.incomplete"):
        (staging / name).symlink_to(outside / "notes")
        with pytest.raises(UserError, match=f"{name}: is not a regular file; remove .*teacher.download"):
            fetch_teacher(teacher_config(), tmp_path / "teacher")
        (staging / name).unlink()
    assert (outside / "notes").read_text() == "mine" and not (tmp_path / "teacher").exists()


def test_a_finished_download_is_checked_again(hub, tmp_path):
    staging = tmp_path / "teacher.download"
    staging.mkdir()
    (staging / hashlib.sha256(FILES[SHARD]).hexdigest()).write_bytes(bytes(len(FILES[SHARD])))
    fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert (tmp_path / "teacher" / SHARD).read_bytes() == FILES[SHARD]


@pytest.mark.parametrize("endpoint", ["http://[", "ftp://host", "nothing", "http://127.0.0.1:99999"])
def test_an_endpoint_that_is_no_address(hub, tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError, match="HF_ENDPOINT") as caught:
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert "\n" not in str(caught.value)


def test_a_repository_name_that_is_none(hub, tmp_path):
    teacher = TeacherConfig(source="hub", repo_id="../../etc", revision="x")
    with pytest.raises(UserError, match=r"write teacher\.repo_id like"):
        fetch_teacher(teacher, tmp_path / "teacher")


@pytest.mark.parametrize("redirected", ["/api/", "/resolve/"])
def test_a_token_stays_with_the_hub(hub, tmp_path, monkeypatch, redirected):
    """A hub that sends a request on to another host, or to a local file, gives neither of them anything."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    hub.redirected = redirected
    with Hub() as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        for address in (other.url, other.url.replace("127.0.0.1", "localhost"), "file:///etc/passwd", "http://[::1"):
            hub.redirect = f"{address}/x"
            with pytest.raises(UserError, match=r"the server refuses|cannot be reached"):
                fetch_teacher(teacher_config(), tmp_path / "teacher")
        other.shutdown()
    assert other.authorizations == [None, None]
    assert hub.authorizations and all(hub.authorizations), "the hub itself gets it"
    assert not (tmp_path / "teacher").exists()
