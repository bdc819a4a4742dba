"""A pinned revision of a Hugging Face repository -> a folder: only what a model needs, resumable.

huggingface_hub's own snapshot_download throws an unfinished file away when it is interrupted (since 2.x each attempt
writes to a name of its own), which for shards of many gigabytes is no resuming. So its parts are used one by one: the
listing, the URL, the headers, and http_get with its retries (blocks of 10 MB), appending to a file named after its
content.
"""

import contextlib
import fnmatch
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from minitron_train.config import TeacherConfig
from minitron_train.console import say
from minitron_train.errors import UserError
from minitron_train.fetch.common import finished_facts, record_facts, require_disk
from minitron_train.files import atomic_folder, byte_size, disk_errors, exclusive, sha256_file

# Top-level files of a repository that make a model folder; never code (*.py), pickles (*.bin) or other formats.
WANTED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
)
# First match wins: a gated repository is also one that is not found.
REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "its owner asks you to accept a licence; do so on its page, then set HF_TOKEN"),
    (RepositoryNotFoundError, "no such repository, or a private one; check teacher.repo_id or set HF_TOKEN"),
    (RevisionNotFoundError, "it has no such revision; check teacher.revision"),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it, or give a folder with teacher.path"),
    (HfHubHTTPError, "the server refuses; try again later, what has arrived is kept"),
    (httpx2.HTTPError, "cannot be reached; check the network or set HF_ENDPOINT to a mirror, what has arrived is kept"),
)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository: name, bytes, and the digest that names its content on the hub."""

    name: str
    num_bytes: int
    git_sha1: str  # of b"blob LENGTH\0" + content
    sha256: str | None  # of the content, for files in large-file storage

    @property
    def digest(self) -> str:
        """What the file is called while it is being downloaded."""
        return self.sha256 or self.git_sha1

    def matches(self, path: Path) -> bool:
        """Whether the bytes at `path` are this file's."""
        if self.sha256:
            return sha256_file(path) == self.sha256
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == self.git_sha1


def hub_endpoint() -> str:
    """HF_ENDPOINT as it is now, else the public hub."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@contextlib.contextmanager
def hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """What the hub or the network refuse, as one line with its remedy."""
    try:
        yield
    except tuple(kind for kind, _ in REMEDIES) as error:
        remedy = next(text for kind, text in REMEDIES if isinstance(error, kind))
        raise UserError(f"{repo_id} at {revision} from {hub_endpoint()}: {remedy}") from error


def list_files(siblings: list[Any]) -> list[HubFile]:
    """The files of a repository that make a model folder, smallest first (a wrong config shows before the shards).

    Raises:
        UserError: no config.json or no safetensors among them.
    """
    files = [
        HubFile(sibling.rfilename, sibling.size, sibling.blob_id, sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in siblings
        if any(fnmatch.fnmatchcase(sibling.rfilename, pattern) for pattern in WANTED) and "/" not in sibling.rfilename
    ]
    for needed in ("config.json", "*.safetensors"):
        if not fnmatch.filter([file.name for file in files], needed):
            raise UserError(f"the repository has no {needed} at its top level; use one in safetensors format")
    return sorted(files, key=lambda file: file.num_bytes)


def teacher_from_hub(teacher: TeacherConfig, folder: Path, *, force: bool) -> dict[str, Any]:
    """The model files of a repository at a pinned revision (see teacher.fetch_teacher).

    Until all have arrived they wait in `FOLDER.download`, so that an interrupted fetch goes on where it stopped.
    """
    assert teacher.repo_id and teacher.revision, "TeacherConfig.validate"
    identity = {"source": "hub", "repo_id": teacher.repo_id, "revision": teacher.revision}
    finished = finished_facts(folder, identity)
    if finished and not force:
        require_commit(teacher, finished["commit"])
        return finished
    staging = folder.with_name(folder.name + ".download")
    with hub_errors(teacher.repo_id, teacher.revision):
        api = HfApi(endpoint=hub_endpoint())
        info = api.model_info(teacher.repo_id, revision=teacher.revision, files_metadata=True)
        require_commit(teacher, str(info.sha))
        files = list_files(info.siblings or [])
        missing_bytes = sum(file.num_bytes - arrived_bytes(file, staging) for file in files)
        require_disk(f"teacher {teacher.repo_id}", {folder: missing_bytes})
        with disk_errors(staging), exclusive(staging / "lock", staging):  # two that append to one file would spoil it
            for file in files:
                download_file(teacher.repo_id, str(info.sha), file, staging)
            facts = {
                **identity,
                "commit": info.sha,
                "license": info.card_data.get("license") if info.card_data else None,
                "files": {file.name: file.digest for file in files},
            }
            with atomic_folder(folder) as scratch:
                for file in files:
                    link_or_copy(staging / file.digest, scratch / file.name)
                record_facts(scratch, facts)
            shutil.rmtree(staging)
    return facts


def require_commit(teacher: TeacherConfig, commit: str) -> None:
    """Refuse a branch or pull request that is no longer the commit that the recipe was written for."""
    if not commit.startswith(teacher.commit or ""):
        moved = f"{teacher.repo_id} at {teacher.revision} is now commit {commit}, the recipe expects {teacher.commit}"
        raise UserError(f"{moved}; look at what changed, then set teacher.commit")


def arrived_bytes(file: HubFile, staging: Path) -> int:
    """How much of the file an earlier, interrupted fetch has left."""
    paths = [path for path in (staging / file.digest, staging / f"{file.digest}.incomplete") if path.exists()]
    return min(file.num_bytes, sum(path.stat().st_size for path in paths))


def download_file(repo_id: str, commit: str, file: HubFile, staging: Path) -> None:
    """Make `staging/DIGEST` the checked content of one file, going on from `DIGEST.incomplete`.

    Raises:
        UserError: the content is not what the hub's listing says; it is deleted.
    """
    target, partial = staging / file.digest, staging / f"{file.digest}.incomplete"
    if target.exists():
        return
    start = partial.stat().st_size if partial.exists() else 0
    if start > file.num_bytes:
        partial.unlink()
        start = 0
    if not sys.stderr.isatty():  # on a terminal http_get draws a bar
        arrived = f", {byte_size(start)} are here" if start else ""
        say(f"downloading {file.name} ({byte_size(file.num_bytes)}{arrived})")
    with partial.open("ab") as sink:
        http_get(
            hf_hub_url(repo_id, file.name, revision=commit, endpoint=hub_endpoint()),
            sink,
            resume_size=start,
            headers={**build_hf_headers(), "Accept-Encoding": "identity"},  # a byte range of a gzip stream is useless
            expected_size=file.num_bytes,
            displayed_filename=file.name,
        )
    if not file.matches(partial):
        partial.unlink()
        raise UserError(f"{repo_id}/{file.name}: what arrived is not what the hub lists ({file.digest}); fetch again")
    os.replace(partial, target)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes (no second 10 GB); a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
