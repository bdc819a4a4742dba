"""Pre-tokenised sources: megatron-core's IndexedDataset (.bin/.idx). With random access, a rank reads only its own rows.

Documents must already end with the end-of-document token (Megatron's preprocess_data.py --append-eod): none is appended.
A document of several sequences (--split-sentences) is not split.
"""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minitron_train.data import identity
from minitron_train.data.formats import combine
from minitron_train.data.packed import unreadable
from minitron_train.data.units import Split, Unit, permutation
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError

BLOCK_TOKENS = 8192
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, number of sequences, number of documents
MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # megatron-core's DType, without floating point
SAMPLED_DOCUMENTS = 100  # documents per pair whose last token is checked


@dataclass(frozen=True)
class Index:
    """The arrays of an .idx file."""

    dtype: np.dtype
    lengths: np.ndarray  # [sequences] int64, tokens
    pointers: np.ndarray  # [sequences] int64, bytes
    bounds: np.ndarray  # [documents + 1] int64: the first sequence of each document, and the end


def read_index(path: Path) -> Index:
    """Read and check the arrays of an .idx file. megatron-core's reader does not check them.

    Raises:
        UserError: it is not an index, is cut off, or has another version or dtype.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
            if not head.startswith(MAGIC):
                raise UserError(f"{path}: not a megatron-core index; write it again")
            _, version, code, num_sequences, num_bounds = HEADER.unpack(head) if len(head) == HEADER.size else (0,) * 5
            size = HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
            if os.fstat(file.fileno()).st_size < size or not version:
                raise UserError(f"{path}: a broken megatron-core index (cut off); write it again")
            if version != 1 or code not in DTYPES:
                raise UserError(
                    f"{path}: a broken megatron-core index (version {version}, dtype {code}; version 1 and integers are "
                    "read); write it again"
                )
            kinds = (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_bounds))
            lengths, pointers, bounds = (np.fromfile(file, kind, count) for kind, count in kinds)
    except OSError as error:
        raise unreadable(path, error) from error
    return Index(np.dtype(DTYPES[code]), lengths.astype(np.int64), pointers, bounds)


def check_sequences(prefix: Path, index: Index) -> None:
    """Refuse sequences outside of the .bin file, and documents that are not consecutive sequences."""
    tokens = prefix.with_name(prefix.name + ".bin")
    try:
        size_bytes = tokens.stat().st_size
    except OSError as error:
        raise unreadable(tokens, error) from error
    pointers, lengths, bounds = index.pointers, index.lengths, index.bounds
    if min(pointers.min(initial=0), lengths.min(initial=0)) < 0:
        raise UserError(f"{prefix}.idx: a broken megatron-core index (negative lengths or offsets); write it again")
    promised = int((pointers + lengths * index.dtype.itemsize).max(initial=0))
    if size_bytes < max(promised, int(pointers.max(initial=0))):
        raise UserError(f"{tokens}: {size_bytes:,} bytes, its .idx promises {promised:,}; copy both again")
    if [*bounds[:1], *bounds[-1:]] != [0, len(lengths)] or (np.diff(bounds) < 0).any():
        raise UserError(
            f"{prefix}.idx: a broken megatron-core index (its documents are not its {len(lengths):,} sequences, in order); "
            "write it again"
        )


class Pair:
    """One opened .bin/.idx pair: its documents, each a run of sequences."""

    def __init__(self, prefix: Path) -> None:
        self.tokens_path = prefix.with_name(prefix.name + ".bin")
        index = read_index(prefix.with_name(prefix.name + ".idx"))
        check_sequences(prefix, index)
        self.dtype, self.pointers, self.firsts = index.dtype, index.pointers, index.bounds
        self.sequence_ends = np.cumsum(index.lengths)  # tokens
        ends = np.append(0, self.sequence_ends)
        self.lengths = np.diff(ends[self.firsts])  # tokens of each document
        self.is_packed = np.array_equal(self.pointers, ends[:-1] * self.dtype.itemsize)  # no gaps between sequences

    @cached_property
    def file(self) -> BinaryIO:
        """The opened .bin file."""
        try:
            return self.tokens_path.open("rb", buffering=0)
        except OSError as error:
            raise unreadable(self.tokens_path, error) from error

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of one document."""
        first = int(self.firsts[document])
        offset = int(self.sequence_ends[first - 1]) if first else 0
        position, end = offset + start, offset + stop
        if self.is_packed:
            return self.read_at(position * self.dtype.itemsize, stop - start)
        pieces = [np.empty(0, self.dtype)]
        sequence = int(np.searchsorted(self.sequence_ends, position, side="right"))
        while position < end:
            begin = int(self.sequence_ends[sequence - 1]) if sequence else 0
            piece_end = min(end, int(self.sequence_ends[sequence]))
            at = int(self.pointers[sequence]) + (position - begin) * self.dtype.itemsize
            pieces.append(self.read_at(at, piece_end - position))
            position, sequence = piece_end, sequence + 1
        return np.concatenate(pieces)

    def read_at(self, offset: int, count: int) -> np.ndarray:
        """`count` tokens from a byte offset; a UserError if the file has become shorter."""
        try:
            raw = os.pread(self.file.fileno(), count * self.dtype.itemsize, offset)
        except OSError as error:
            raise unreadable(self.tokens_path, error) from error
        if len(raw) < count * self.dtype.itemsize:
            raise UserError(f"{self.tokens_path}: was cut off while it was read; restore the file, and run again")
        return np.frombuffer(raw, self.dtype)


class IndexedSource:
    """The documents of one or more .bin/.idx pairs, in blocks of about 8192 tokens."""

    def __init__(self, prefixes: Sequence[Path], split: Split) -> None:
        self.prefixes = prefixes
        self.split = split
        self.files = [prefix.with_name(prefix.name + suffix) for prefix in prefixes for suffix in (".idx", ".bin")]
        self.records: Mapping[str, identity.FileRecord] | None = None  # see Watch

    @cached_property
    def watch(self) -> identity.Watch:
        """The files as they were when opened; without it, a change would go unnoticed."""
        return identity.Watch(self.files, self.records)

    @cached_property
    def pairs(self) -> list[Pair]:
        """The opened pairs."""
        _ = self.watch  # records the files before they are opened
        return [Pair(prefix) for prefix in self.prefixes]

    @cached_property
    def firsts(self) -> np.ndarray:
        """Index of the first document of each pair, then the number of documents: int64 [pairs + 1]."""
        return np.cumsum([0, *(len(pair.lengths) for pair in self.pairs)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, over all pairs."""
        return np.concatenate([pair.lengths for pair in self.pairs])

    @cached_property
    def block_starts(self) -> np.ndarray:
        """Index of the first document of each block, then the number of documents: int64 [blocks + 1]."""
        before = np.cumsum(self.lengths) - self.lengths
        starts = np.flatnonzero(np.diff(before // BLOCK_TOKENS, prepend=-1))
        return np.append(starts, len(self.lengths))

    @property
    def num_blocks(self) -> int:
        return len(self.block_starts) - 1

    @property
    def block_bytes(self) -> int:
        """Approximate size of a block's tokens as text."""
        return 4 * BLOCK_TOKENS

    def unit(self, blocks: Iterable[int], seed: tuple[int, ...], vocab_size: int) -> Unit:
        """The split's documents of some blocks, shuffled. Tokens are read and checked when the unit is sliced."""
        runs = [np.arange(*self.block_starts[block : block + 2]) for block in blocks]
        numbers = np.concatenate([np.empty(0, np.int64), *runs])
        numbers = numbers[[self.split.wants(f"sequence {number}") for number in numbers]]
        numbers = numbers[permutation(len(numbers), *seed)]
        ends = np.cumsum(self.lengths[numbers])
        return Unit(IndexedTokens(self, numbers, ends, vocab_size), ends)

    def read(self, number: int, start: int, stop: int, vocab_size: int) -> np.ndarray:
        """Tokens start to stop of one document; a UserError if one is outside the vocabulary."""
        pair = int(np.searchsorted(self.firsts, number, side="right")) - 1
        self.watch.check(*self.files[2 * pair : 2 * pair + 2])
        tokens = self.pairs[pair].read(int(number - self.firsts[pair]), start, stop)
        wrong = next(
            (t for t in (int(tokens.min(initial=0)), int(tokens.max(initial=0))) if not 0 <= t < vocab_size), None
        )
        if wrong is not None:
            raise UserError(
                f"{self.prefixes[pair]}.bin: token {wrong} is outside the tokenizer's vocabulary of {vocab_size} entries; "
                "the pair was made with another tokenizer: write it again with the model's"
            )
        return tokens

    def warn_without_ends(self, end: int) -> None:
        """Warn about each pair in which no sampled document ends with the token `end`."""
        for prefix, pair in zip(self.prefixes, self.pairs, strict=True):
            documents = np.flatnonzero(pair.lengths)
            chosen = documents[:: max(1, len(documents) // SAMPLED_DOCUMENTS)][:SAMPLED_DOCUMENTS]
            lasts = [int(pair.read(int(i), int(pair.lengths[i]) - 1, int(pair.lengths[i]))[0]) for i in chosen]
            if lasts and end not in lasts:
                say(
                    f"warning: {prefix}.bin: none of {len(lasts)} documents ends with the end-of-document token {end}; "
                    "documents are not separated: write the pair with --append-eod, or set data.document_end"
                )

    def fingerprint(self) -> str:
        """sha256 of the index and token files."""
        return combine([record.sha256 for record in identity.records_of(self.files)])


class IndexedTokens:
    """The tokens of some documents as one array; slicing reads them."""

    def __init__(self, source: IndexedSource, numbers: np.ndarray, ends: np.ndarray, vocab_size: int) -> None:
        self.source = source
        self.numbers = numbers
        self.ends = ends
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, window: slice, /) -> np.ndarray:
        start, stop, _ = window.indices(len(self))
        pieces = [np.empty(0, np.int32)]
        i = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[i - 1]) if i else 0
            end = min(stop, int(self.ends[i]))
            piece = self.source.read(self.numbers[i], start - begin, end - begin, self.vocab_size)
            pieces.append(piece.astype(np.int32))
            start, i = end, i + 1
        return np.concatenate(pieces)
