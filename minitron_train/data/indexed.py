"""Pre-tokenised sources: megatron-core's IndexedDataset (.bin/.idx). Random access: only the rows of this rank are read.

The documents must end as the model expects (Megatron's preprocess_data.py --append-eod): nothing is appended.
"""

import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minitron_train.data import identity
from minitron_train.data.formats import combine
from minitron_train.data.units import Split, Unit, permutation
from minitron_train.errors import UserError

BLOCK_TOKENS = 8192
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, number of sequences, number of documents
MAGIC = b"MMIDIDX\0\0"


def check_index(path: Path) -> None:
    """Refuse an .idx file that is none or is cut off (megatron-core's reader would say so in several lines)."""
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise UserError(f"{path}: not a megatron-core index; write it again")
    _, _, _, num_sequences, num_documents = HEADER.unpack(head) if len(head) == HEADER.size else (0,) * 5
    size = HEADER.size + num_sequences * (4 + 8) + num_documents * 8  # lengths and offsets, documents
    if path.stat().st_size < size:
        raise UserError(f"{path}: a broken megatron-core index (cut off); write it again")


def check_length(prefix: Path, index: Any) -> None:
    """Refuse a .bin file that ends before the last sequence of its index does."""
    ends = index.sequence_pointers + index.sequence_lengths.astype(np.int64) * index.dtype_size
    tokens = prefix.with_name(prefix.name + ".bin")
    size, promised = tokens.stat().st_size, int(ends.max(initial=0))
    if size < promised:
        raise UserError(f"{tokens}: {size:,} bytes, its .idx promises {promised:,}; copy both again")


class IndexedSource:
    """The documents of one or more .bin/.idx pairs, in blocks of about 8192 tokens."""

    def __init__(self, prefixes: Sequence[Path], split: Split) -> None:
        self.prefixes = prefixes
        self.split = split
        self.files = [prefix.with_name(prefix.name + suffix) for prefix in prefixes for suffix in (".idx", ".bin")]

    @cached_property
    def watch(self) -> identity.Watch:
        """The files as they were opened: they are mapped, so that a change would be read, and a cut end the process."""
        return identity.Watch(self.files)

    @cached_property
    def datasets(self) -> list:
        """The opened pairs (megatron-core is imported only where such a source is used)."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        datasets = []
        _ = self.watch  # before the files are mapped
        for prefix in self.prefixes:
            check_index(prefix.with_name(prefix.name + ".idx"))
            try:
                datasets.append(IndexedDataset(str(prefix), mmap=True))
            except (AssertionError, OSError, ValueError, struct.error) as error:
                raise UserError(f"{prefix}.idx: a broken megatron-core index ({error}); write it again") from error
            check_length(prefix, datasets[-1].index)
        return datasets

    @cached_property
    def firsts(self) -> np.ndarray:
        """Number of the first sequence of each pair, and of the end: int64 [pairs + 1]."""
        return np.cumsum([0, *(len(dataset.sequence_lengths) for dataset in self.datasets)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, through all pairs."""
        return np.concatenate([dataset.sequence_lengths for dataset in self.datasets]).astype(np.int64)

    @cached_property
    def block_starts(self) -> np.ndarray:
        """Sequence with which each block begins, and the end: int64 [blocks + 1]."""
        before = np.cumsum(self.lengths) - self.lengths
        starts = np.flatnonzero(np.diff(before // BLOCK_TOKENS, prepend=-1))
        return np.append(starts, len(self.lengths))

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_starts) - 1

    @property
    def block_bytes(self) -> int:
        """What a block's tokens would be as text, about."""
        return 4 * BLOCK_TOKENS

    def unit(self, blocks: Iterable[int], seed: tuple[int, ...], vocab_size: int) -> Unit:
        """The wanted sequences of some blocks, shuffled; their tokens are read, and checked, when they are sliced."""
        runs = [np.arange(*self.block_starts[block : block + 2]) for block in blocks]
        numbers = np.concatenate([np.empty(0, np.int64), *runs])
        numbers = numbers[[self.split.wants(f"sequence {number}") for number in numbers]]
        numbers = numbers[permutation(len(numbers), *seed)]
        ends = np.cumsum(self.lengths[numbers])
        return Unit(IndexedTokens(self, numbers, ends, vocab_size), ends)

    def read(self, number: int, start: int, stop: int, vocab_size: int) -> np.ndarray:
        """Tokens start to stop of one sequence; a UserError where one is outside the vocabulary."""
        pair = int(np.searchsorted(self.firsts, number, side="right")) - 1
        self.watch.check(*self.files[2 * pair : 2 * pair + 2])
        tokens = self.datasets[pair].get(int(number - self.firsts[pair]), offset=start, length=stop - start)
        if (largest := int(tokens.max(initial=0))) >= vocab_size:
            raise UserError(
                f"{self.prefixes[pair]}.bin: token {largest} is outside the tokenizer's vocabulary of {vocab_size} entries; "
                "the pair was made with another tokenizer: write it again with the model's"
            )
        return tokens

    def fingerprint(self) -> str:
        """sha256 of the index and token files."""
        return combine([record.sha256 for record in identity.describe(self.files)])


class IndexedTokens:
    """The tokens of chosen sequences as one array, read where they are sliced."""

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
