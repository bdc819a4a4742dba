"""Decode a hub's listing of a repository, and check every value before it becomes a path, a size or a URL.

A hub is not trusted: HF_ENDPOINT may name a mirror that is wrong, broken or hostile. A digest must be hex digits, a
commit 40 of them, a size a count of bytes, and a name a single file name.
"""

import fnmatch
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from minitron_train.hf.locate import INDEX, LICENCE_FILES, TOKENIZER_FILES
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.records import decode

MAX_LISTING_BYTES = 64 * 2**20  # a listing has about 300 bytes for each file
MAX_FILE_BYTES = 2**43  # 8.8 TB; the largest published model has 1.5 TB in all its files
MAX_NAME_BYTES = 255  # UTF-8 bytes of a file name, the limit of common file systems
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # an identifier of the hub, like apache-2.0

# Top-level files of a repository that make a model folder; never code (*.py), pickles (*.bin) or other formats.
WANTED = ("config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES, *LICENCE_FILES)

Sha1 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{40}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
NumBytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]


@dataclass(frozen=True, slots=True)
class LargeFile:
    """Digest and size of a file in large-file storage."""

    sha256: Sha256
    size: NumBytes


@dataclass(frozen=True, slots=True)
class Sibling:
    """One wanted entry of the listing, as the hub spells it."""

    rfilename: str
    size: NumBytes
    blobId: Sha1
    lfs: LargeFile | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The keys that are used of /api/models/REPO/revision/REVISION?blobs=true."""

    sha: Sha1
    siblings: list[dict[str, Any]]  # only wanted ones are decoded: mirrors omit the sizes of other files
    cardData: Any = None

    @property
    def licence(self) -> str | None:
        """The licence identifier of the model card; None if it is missing or malformed."""
        stated = self.cardData.get("license") if isinstance(self.cardData, dict) else None
        return stated if isinstance(stated, str) and LICENCE.fullmatch(stated) else None


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository: name, bytes, and the digest that names its content on the hub."""

    name: str
    num_bytes: int
    git_sha1: str  # sha1 of b"blob LENGTH\0" + content
    sha256: str | None  # sha256 of the content, for files in large-file storage

    @property
    def digest(self) -> str:
        """The name of the file during the download."""
        return self.sha256 or self.git_sha1


def read_listing(answer: bytes, where: str) -> Listing:
    """The hub's answer as a Listing.

    Raises:
        UserError: not JSON, or a commit or list of another form.
    """
    return decode(answer, Listing, f"the listing of {where}", "check HF_ENDPOINT")


def wanted_files(listing: Listing, where: str) -> list[HubFile]:
    """The files of a repository that make a model folder, smallest first (a wrong config shows before the shards).

    Raises:
        UserError: config.json or safetensors are missing, or a name, size or digest is invalid.
    """
    files = [checked_file(entry, where) for entry in listing.siblings if is_wanted(entry.get("rfilename"))]
    alike = Counter(file.name.casefold() for file in files)
    if twice := [file.name for file in files if alike[file.name.casefold()] > 1]:
        raise UserError(f"{where}: lists {twice[-1]!r} twice, or in two spellings; use another repository or endpoint")
    for needed in ("config.json", "*.safetensors"):
        if not fnmatch.filter([file.name for file in files], needed):
            raise UserError(f"{where}: has no {needed} at its top level; use a repository in safetensors format")
    return sorted(files, key=lambda file: file.num_bytes)


def is_wanted(name: Any) -> bool:
    """Whether the name is that of a top-level file of a model folder."""
    return isinstance(name, str) and "/" not in name and any(fnmatch.fnmatchcase(name, wanted) for wanted in WANTED)


def checked_file(entry: dict[str, Any], where: str) -> HubFile:
    """One wanted entry, decoded.

    Raises:
        UserError: the name is not a file name, the size is out of range, or a digest has another form.
    """
    name = entry["rfilename"]
    if not name.isprintable() or "\\" in name or len(name.encode("utf-8")) > MAX_NAME_BYTES:
        rule = f"must be printable, without slashes, and at most {MAX_NAME_BYTES} bytes long"
        raise UserError(f"{where}: lists a file named {name[:80]!r}; a name {rule}; check HF_ENDPOINT")
    try:
        sibling = msgspec.convert(entry, Sibling)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: the entry of {name} is wrong ({first_line(error)}); check HF_ENDPOINT") from None
    if sibling.lfs and sibling.lfs.size != sibling.size:
        sizes = f"{sibling.size} and {sibling.lfs.size} bytes"
        raise UserError(f"{where}: lists two sizes of {name}, {sizes}; check HF_ENDPOINT")
    return HubFile(name, sibling.size, sibling.blobId, sibling.lfs.sha256 if sibling.lfs else None)


def refuse_links(staging: Path) -> None:
    """Refuse a download folder that is a link or holds one: writes would end up somewhere else.

    Raises:
        UserError: it, or an entry of it, is a link, a folder, a pipe or a device.
    """
    if not os.path.lexists(staging):
        return
    if staging.is_symlink() or not staging.is_dir():
        raise UserError(f"{staging}: is not a folder; remove it, downloads are kept there")
    for path in staging.iterdir():
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path}: is not a regular file; remove {staging} and fetch again")
