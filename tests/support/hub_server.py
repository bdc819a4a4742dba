"""A hub on loopback with the part of the Hugging Face protocol that the tests need; it sends wrong answers on request."""

import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from minitron_train.config import TeacherConfig

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
    """Serves FILES at one commit. A test changes the attributes while it serves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = {**FILES, **UNWANTED}
        self.listed = dict(self.contents)
        self.gets: list[tuple[str, int]] = []  # (file, first byte asked for)
        self.cut_bytes: int | None = None  # after so many bytes of SHARD the connection breaks, and the server is ill
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code of the listing
        self.pause_s = 0.0  # between blocks of SHARD
        self.ill = False
        self.lies: dict[str, dict[str, Any]] = {}  # file -> keys of its entry in the listing that are replaced
        self.answer: bytes | None = None  # in place of the listing
        self.headers: dict[str, str] = {}  # of SHARD, in place of the true ones
        self.redirect = ""  # address that every request for a path with `redirected` in it is sent on to
        self.redirected = ""
        self.authorizations: list[str | None] = []  # of every request
        self.extra = b""  # sent after the true content of SHARD

    def handle_error(self, request, client_address):
        """The client may leave."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """GET /api/models/REPO/revision/REV and GET /REPO/resolve/COMMIT/FILE with Range."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.authorizations.append(self.headers.get("Authorization"))
        if self.server.redirect and self.server.redirected in path:
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith(f"/api/models/{REPO}/revision/"):
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
            siblings.append(sibling | self.server.lies.get(name, {}))
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}).encode()
        body = self.server.answer or body
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_content(self, name):
        content = self.server.contents[name] + (self.server.extra if name == SHARD else b"")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.server.gets.append((name, start))
        if self.server.ill:
            self.send_error(503)
            return
        self.send_response(206 if asked else 200)
        headers = {"Content-Length": str(len(content) - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in (headers | (self.server.headers if name == SHARD else {})).items():
            self.send_header(key, value)
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


def teacher_config(revision: str = COMMIT) -> TeacherConfig:
    teacher = TeacherConfig(source="hub", repo_id=REPO, revision=revision)
    teacher.validate()
    return teacher
