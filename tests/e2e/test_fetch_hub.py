"""fetch from a hub: a small server on loopback that speaks as much of the hub's language as is needed."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from minitron_train.config import TeacherConfig
from minitron_train.errors import UserError
from minitron_train.fetch.teacher import fetch_teacher
from minitron_train.files import exclusive

REPO, COMMIT = "someone/model", "a" * 40
SHARD = "model-00002-of-00002.safetensors"
BLOCK_BYTES = 1 << 14  # what huggingface_hub writes at once; 10 MB where the tests do not say otherwise
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}" * 50,
    "model.safetensors.index.json": b"{}",
    "LICENSE": b"",  # empty in nvidia/Minitron-8B-Base
    "model-00001-of-00002.safetensors": bytes(range(256)) * 200,
    SHARD: bytes(reversed(range(256))) * 4000,
}
UNWANTED = {
    "modeling_x.py": b"evil()",
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"x",
    "x.gguf": b"x",
}


class Hub(ThreadingHTTPServer):
    """Serves FILES at one commit; the test changes what it does meanwhile."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = {**FILES, **UNWANTED}
        self.listed = dict(self.contents)
        self.gets: list[tuple[str, int]] = []  # (file, first byte asked for)
        self.cut_bytes: int | None = None  # SHARD breaks off after so many bytes, and then the server is ill
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code of the listing
        self.pause_s = 0.0  # between blocks of SHARD
        self.ill = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """GET /api/models/REPO/revision/REV and GET /REPO/resolve/COMMIT/FILE with Range."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPO}/revision/"):
            self.send_listing()
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.send_content(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"))
        else:
            self.send_error(404)

    def send_listing(self):
        if self.server.refusal:
            status, code = self.server.refusal
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        siblings = []
        for name, content in self.server.listed.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_content(self, name):
        content = self.server.contents[name]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.server.gets.append((name, start))
        if self.server.ill:
            self.send_error(503)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = len(content)
        if name == SHARD and self.server.cut_bytes is not None:
            end = start + self.server.cut_bytes
            self.server.ill = self.close_connection = True
        if name == SHARD and self.server.pause_s:
            for first in range(start, end, BLOCK_BYTES):
                self.wfile.write(content[first : first + BLOCK_BYTES])
                time.sleep(self.server.pause_s)
        else:
            self.wfile.write(content[start:end])

    def log_message(self, *_args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", BLOCK_BYTES)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def teacher_config(revision: str = COMMIT) -> TeacherConfig:
    teacher = TeacherConfig(source="hub", repo_id=REPO, revision=revision)
    teacher.validate()
    return teacher


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
    with pytest.raises(UserError, match="the server refuses; try again later, what has arrived is kept"):
        fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    hub.cut_bytes, hub.ill = None, False
    hub.gets.clear()
    fetch_teacher(teacher_config(), tmp_path / "teacher")
    assert hub.gets == [(SHARD, 18 * BLOCK_BYTES)], "finished files are not asked for again"
    assert (tmp_path / "teacher" / SHARD).read_bytes() == FILES[SHARD]


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
    with pytest.raises(UserError, match=f"{name}: what arrived is not what the hub lists"):
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
