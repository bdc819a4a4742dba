"""Download the model files of a pinned revision of a Hugging Face repository; an interrupted download resumes.

huggingface_hub's snapshot_download discards an unfinished file when it is interrupted (since 2.x each attempt writes
under a name of its own), so a shard of many gigabytes starts over. This module uses its parts instead: the listing, the
URL, the headers, and http_get with its retries (blocks of 10 MB). It appends to a file named after its content.
"""

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from huggingface_hub.utils import http_stream_backoff as open_stream

from minitron_train.config import TeacherConfig
from minitron_train.fetch.common import finished_facts, record_facts, require_disk
from minitron_train.fetch.listing import MAX_LISTING_BYTES, HubFile, Listing, read_listing, refuse_links, wanted_files
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import atomic_folder, byte_size, disk_errors, exclusive, sha256_file

# The first match wins: GatedRepoError is also a RepositoryNotFoundError.
REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "its owner asks you to accept a licence; do so on its page, then set HF_TOKEN"),
    (RepositoryNotFoundError, "no such repository, or a private one; check teacher.repo_id or set HF_TOKEN"),
    (RevisionNotFoundError, "it has no such revision; check teacher.revision"),
    (HFValidationError, "the name is not a repository's; write teacher.repo_id like nvidia/Minitron-4B-Base"),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it, or give a folder with teacher.path"),
    (HfHubHTTPError, "the server refuses; try again later, what was downloaded is kept"),
    (httpx2.InvalidURL, "the address is not a URL; write HF_ENDPOINT like https://huggingface.co"),
    (
        httpx2.HTTPError,
        "cannot be reached; check the network or set HF_ENDPOINT to a mirror, what was downloaded is kept",
    ),
)


def hub_endpoint() -> str:
    """HF_ENDPOINT if it is set now, otherwise the public hub."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@contextlib.contextmanager
def hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """Turn errors of the hub or the network into a UserError with the remedy."""
    try:
        yield
    except tuple(kind for kind, _ in REMEDIES) as error:
        remedy = next(text for kind, text in REMEDIES if isinstance(error, kind))
        raise UserError(f"{repo_id} at {revision} from {hub_endpoint()}: {remedy}") from error


def read_repository(repo_id: str, revision: str) -> Listing:
    """Read the hub's listing of a repository at a revision.

    Raises:
        UserError: the answer has another form, or is longer than MAX_LISTING_BYTES.
    """
    validate_repo_id(repo_id)
    try:
        get_session()
    except (ValueError, ImportError) as error:  # a wrong proxy, before any request
        raise UserError(
            f"the proxy in the environment cannot be used ({first_line(error)}); write HTTPS_PROXY like http://host:3128"
        ) from error
    url = f"{hub_endpoint()}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
    answer = bytearray()
    once: dict[str, Any] = {"retry_on_exceptions": (), "retry_on_status_codes": (), "follow_redirects": True}
    headers, timeout_s = build_hf_headers(), constants.HF_HUB_ETAG_TIMEOUT
    with open_stream("GET", f"{url}?blobs=true", headers=headers, timeout=timeout_s, **once) as got:
        hf_raise_for_status(got)
        for block in got.iter_bytes():
            answer += block
            if len(answer) > MAX_LISTING_BYTES:
                rule = f"longer than {byte_size(MAX_LISTING_BYTES)}"
                raise UserError(f"the listing of {repo_id}: is {rule}; check HF_ENDPOINT")
    return read_listing(bytes(answer), repo_id)


def teacher_from_hub(teacher: TeacherConfig, folder: Path, *, force: bool) -> dict[str, Any]:
    """Download the model files of a repository at a pinned revision (see teacher.fetch_teacher).

    They are collected in `FOLDER.download` until all are complete, so that an interrupted fetch resumes.
    """
    assert teacher.repo_id and teacher.revision, "TeacherConfig.validate"
    identity = {"source": "hub", "repo_id": teacher.repo_id, "revision": teacher.revision}
    finished = finished_facts(folder, identity)
    if finished and not force:
        require_commit(teacher, finished.get("commit", "unknown"))
        return finished
    staging = folder.with_name(folder.name + ".download")
    with hub_errors(teacher.repo_id, teacher.revision):
        listing = read_repository(teacher.repo_id, teacher.revision)
        require_commit(teacher, listing.sha)
        files = wanted_files(listing, teacher.repo_id)
        refuse_links(staging)
        missing_bytes = sum(file.num_bytes - arrived_bytes(file, staging) for file in files)
        require_disk(f"teacher {teacher.repo_id}", {folder: missing_bytes})
        with disk_errors(staging), exclusive(staging / "lock", staging):  # two processes must not append to one file
            for file in files:
                download_file(teacher.repo_id, listing.sha, file, staging)
            facts = {
                **identity,
                "commit": listing.sha,
                "license": listing.licence,
                "files": {file.name: file.digest for file in files},
            }
            with atomic_folder(folder) as scratch:
                for file in files:
                    link_or_copy(staging / file.digest, scratch / file.name)
                record_facts(scratch, facts)
            shutil.rmtree(staging)
    return facts


def require_commit(teacher: TeacherConfig, commit: str) -> None:
    """Refuse a branch or pull request that no longer points to the commit that the recipe expects."""
    if not commit.startswith(teacher.commit or ""):
        moved = f"{teacher.repo_id} at {teacher.revision} is now commit {commit}, the recipe expects {teacher.commit}"
        raise UserError(f"{moved}; look at what changed, then set teacher.commit")


def arrived_bytes(file: HubFile, staging: Path) -> int:
    """Bytes of the file that an interrupted fetch has downloaded."""
    paths = [path for path in (staging / file.digest, staging / f"{file.digest}.incomplete") if path.exists()]
    return min(file.num_bytes, sum(path.stat().st_size for path in paths))


def matches(file: HubFile, path: Path) -> bool:
    """Whether the content at `path` has the digest of `file`."""
    if file.sha256:
        return sha256_file(path) == file.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == file.git_sha1


class LimitedFile(io.BufferedWriter):
    """A file opened for appending, up to the size in the hub's listing.

    Raises:
        UserError: from `write`, when the server sends more; that block is not written.
    """

    def __init__(self, path: Path, file: HubFile) -> None:
        super().__init__(io.FileIO(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)))
        self.file = file

    def write(self, block: Any, /) -> int:
        if self.tell() + memoryview(block).nbytes > self.file.num_bytes:
            raise UserError(f"{self.file.name}: the server sends more than the {self.file.num_bytes:,} bytes it listed")
        return super().write(block)


def download_file(repo_id: str, commit: str, file: HubFile, staging: Path) -> None:
    """Download one file to `staging/DIGEST` and check it. Resumes from `DIGEST.incomplete`.

    Raises:
        UserError: the content does not match the hub's listing; it is deleted.
    """
    target, partial = staging / file.digest, staging / f"{file.digest}.incomplete"
    if target.exists() and target.stat().st_size == file.num_bytes and matches(file, target):
        return
    target.unlink(missing_ok=True)
    start = partial.stat().st_size if partial.exists() else 0
    if start > file.num_bytes:
        partial.unlink()
        start = 0
    if not sys.stderr.isatty():  # on a terminal http_get draws a bar
        arrived = f", {byte_size(start)} already downloaded" if start else ""
        say(f"downloading {file.name} ({byte_size(file.num_bytes)}{arrived})")
    receive(repo_id, commit, file, partial, start)
    if partial.stat().st_size != file.num_bytes or not matches(file, partial):
        partial.unlink()
        raise UserError(
            f"{repo_id}/{file.name}: the content does not match the hub's listing ({file.digest}); fetch again"
        )
    os.replace(partial, target)


def receive(repo_id: str, commit: str, file: HubFile, partial: Path, start: int) -> None:
    """Append the missing bytes to `partial`, which has `start` bytes.

    Raises:
        UserError: the server sends more or less than it listed, or headers that are not numbers.
    """
    try:
        with LimitedFile(partial, file) as sink:
            http_get(
                hf_hub_url(repo_id, file.name, revision=commit, endpoint=hub_endpoint()),
                sink,
                resume_size=start,
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},  # a range of a gzip stream is useless
                expected_size=file.num_bytes,
                displayed_filename=file.name,
            )
    except UserError as error:
        partial.unlink()
        raise UserError(f"{repo_id}/{error}; check HF_ENDPOINT, or fetch again") from None
    except (ValueError, OSError) as error:  # http_get's own checks raise errors without errno
        if isinstance(error, httpx2.HTTPError | HFValidationError) or getattr(error, "errno", None):
            raise
        raise UserError(
            f"{repo_id}/{file.name}: {first_line(error)}; fetch again, what was downloaded is kept"
        ) from error


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
