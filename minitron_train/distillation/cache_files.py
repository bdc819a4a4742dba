"""The files of a teacher cache, and how they are read back.

    cache.json                                   CacheFormat: what the files hold
    held_out.safetensors                         the held-out tokens (data.held_out)
    position.json                                where the writing stands (train.teach)
    training/FIRST-STOP.RANK-of-SIZE.safetensors sequences FIRST … STOP - 1 of the stream, each SIZE-th from FIRST + RANK on
    held_out/…                                   the same of the held-out sequences, always as hidden states

A part holds for each sequence: its bytes in `payload` (they end at `ends`), a digest of its tokens, labels and documents,
a checksum of its bytes, and the sum of its tokens' entropies. Tokens that the loss does not count are not stored.
"""

import re
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minitron_train.config import TeachKind
from minitron_train.distillation.sample_codec import SampleLayout
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import atomic_file
from minitron_train.runtime.records import Count, open_file, read_record

CACHE = "cache.json"
VERSION = 1  # raise it when files of earlier versions can no longer be read
PART = re.compile(r"(\d+)-(\d+)\.(\d+)-of-(\d+)\.safetensors")
DIGEST_BYTES = 16
MOST_OPEN = 64  # files that a reader keeps open
COLUMNS = {  # tensors of a part: dtype, and size of a sequence's entry
    "ends": (np.dtype(np.int64), ()),
    "digests": (np.dtype(np.uint8), (DIGEST_BYTES,)),
    "checksums": (np.dtype(np.int64), ()),
    "entropies": (np.dtype(np.float64), ()),
}
REMEDY = "restore it from a copy, or run `teach` again with force=true"

Split = Literal["training", "held_out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """cache.json: what decides the bytes of a sequence, and what a reader compares with its own run.

    Attributes:
        dtype: of the teacher's weights and of hidden states.
        num_rows: sequences of the stream, from its beginning.
        stream: TokenStream.fingerprint.
        held_out: sha256 of the held-out tokens.
    """

    version: Count
    kind: TeachKind
    vocab_size: Count
    hidden_size: Count
    dtype: Literal["float32", "bfloat16"]
    draws: Count
    proposal_exponent: float
    temperature: float
    seq_length: Count
    num_rows: Count
    num_held_out: Count
    stream: str
    held_out: str

    @property
    def layout(self) -> SampleLayout:
        """How samples are stored."""
        has_weights = self.proposal_exponent != 1
        return SampleLayout(vocab_size=self.vocab_size, draws=self.draws, has_weights=has_weights)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden_size * (4 if self.dtype == "float32" else 2)

    @property
    def most_bytes(self) -> float:
        """The most bytes that a token of the stream takes."""
        return self.layout.most_bytes if self.kind is TeachKind.samples else self.hidden_bytes


def read_format(folder: Path) -> CacheFormat:
    """Read cache.json.

    Raises:
        UserError: it is missing, damaged, or of another version of this program.
    """
    try:
        found = read_record(folder / CACHE, CacheFormat, REMEDY)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: holds no teacher cache ({CACHE} is missing); run `teach` first") from error
    if found.version != VERSION:
        raise UserError(
            f"{folder / CACHE}: has version {found.version}, this program reads {VERSION}; run `teach` again"
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is stored of one sequence."""

    payload: bytes
    digest: bytes
    entropy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PartName:
    """Which sequences a file holds: `first` + `rank`, and each `size`-th after it, below `stop`."""

    first: int
    stop: int
    rank: int
    size: int

    @property
    def file(self) -> str:
        """The name."""
        return f"{self.first:012d}-{self.stop:012d}.{self.rank:05d}-of-{self.size:05d}.safetensors"

    @property
    def num_rows(self) -> int:
        """Sequences in the file."""
        return len(range(self.first + self.rank, self.stop, self.size))


def write_part(folder: Path, name: PartName, rows: list[Row]) -> None:
    """Write one file atomically."""
    assert len(rows) == name.num_rows
    columns = {
        "ends": [len(row.payload) for row in rows],
        "digests": [list(row.digest) for row in rows],
        "checksums": [zlib.crc32(row.payload) for row in rows],
        "entropies": [row.entropy for row in rows],
    }
    tensors = {key: np.array(columns[key], dtype).reshape(-1, *size) for key, (dtype, size) in COLUMNS.items()}
    tensors["ends"] = tensors["ends"].cumsum()
    tensors["payload"] = np.frombuffer(b"".join(row.payload for row in rows), np.uint8)
    with atomic_file(folder / name.file) as scratch:
        save_file(tensors, scratch)


@dataclass(slots=True)
class Part:
    """An open file: its columns in memory, its payload on disk."""

    path: Path
    file: Any
    columns: dict[str, np.ndarray]

    @classmethod
    def open(cls, path: Path, name: PartName) -> "Part":
        """Open a file and check the type and size of everything in it.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            with open_file(path):
                file = safe_open(path, framework="np")
            payload = file.get_slice("payload")
            columns = {key: file.get_tensor(key) for key in COLUMNS}
        except FileNotFoundError as error:
            raise UserError(f"{path}: is missing; {REMEDY}") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); {REMEDY}") from error
        sizes = {key: (dtype, (name.num_rows, *size)) for key, (dtype, size) in COLUMNS.items()}
        fits = all((columns[key].dtype, columns[key].shape) == wanted for key, wanted in sizes.items())
        ends = [0, *columns["ends"].tolist()] if fits else []
        if not fits or ends != sorted(ends) or (payload.get_dtype(), payload.get_shape()) != ("U8", [ends[-1]]):
            raise UserError(f"{path}: damaged (its tensors do not fit together); {REMEDY}")
        return cls(path, file, columns)

    def row(self, index: int) -> Row:
        """One sequence.

        Raises:
            UserError: its bytes have changed since they were written.
        """
        ends = self.columns["ends"]
        start, end = int(ends[index - 1]) if index else 0, int(ends[index])
        payload = self.file.get_slice("payload")[start:end].tobytes() if end > start else b""
        if zlib.crc32(payload) != self.columns["checksums"][index]:
            raise UserError(f"{self.path}: damaged (sequence {index} of it has another checksum); {REMEDY}")
        digest, entropy = self.columns["digests"][index].tobytes(), float(self.columns["entropies"][index])
        return Row(payload=payload, digest=digest, entropy=entropy)


def finished_parts(folder: Path) -> list[PartName]:
    """The files of a split, by their names, in order."""
    matches = (PART.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    numbers = ([int(number) for number in match.groups()] for match in matches if match)
    found = [PartName(first=a, stop=b, rank=c, size=d) for a, b, c, d in numbers if a < b and c < d]
    return sorted(found, key=lambda name: (name.first, name.rank))


@dataclass(slots=True)
class CacheReader:
    """Reads the sequences of one split, in any order; fastest in the order of the stream.

    Attributes:
        blocks: the name of rank 0's file of each FIRST-STOP, in order.
    """

    folder: Path
    blocks: list[PartName]
    opened: OrderedDict[PartName, Part] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, cache: Path, split: Split, num_rows: int) -> "CacheReader":
        """A reader of a split that has `num_rows` sequences or more.

        Raises:
            UserError: files are missing.
        """
        folder, end, blocks = cache / split, 0, list[PartName]()
        names = finished_parts(folder)
        present = set(names)
        for name in names:
            if name.first == end and name.rank == 0:
                blocks.append(name)
                end = name.stop
                missing = [rank for rank in range(name.size) if of_rank(name, rank) not in present]
                if missing:
                    raise UserError(f"{folder / of_rank(name, missing[0]).file}: is missing; {REMEDY}")
        if end < num_rows:
            raise UserError(f"{folder}: has {end:,} sequences of {num_rows:,}; {REMEDY}")
        return cls(folder, blocks)

    def row(self, number: int) -> Row:
        """One sequence of the split, by its number."""
        block = self.blocks[bisect_right(self.blocks, number, key=lambda name: name.first) - 1]
        assert block.first <= number < block.stop, number
        index, rank = divmod(number - block.first, block.size)
        return self.part(of_rank(block, rank)).row(index)

    def part(self, name: PartName) -> Part:
        """An open file; the one that was used longest ago is closed where there are too many."""
        if name not in self.opened:
            self.opened[name] = Part.open(self.folder / name.file, name)
        self.opened.move_to_end(name)
        if len(self.opened) > MOST_OPEN:
            self.opened.popitem(last=False)
        return self.opened[name]


def of_rank(name: PartName, rank: int) -> PartName:
    """The file of another rank with the same sequences between first and stop."""
    return PartName(first=name.first, stop=name.stop, rank=rank, size=name.size)
