"""The opened sources of a blend and the processes that tokenise them: for each source, its units in order."""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from minitron_train.config import DataConfig
from minitron_train.data import sources, tokenizers
from minitron_train.data.hub import HubSource
from minitron_train.data.identity import FileRecord, Watch, records_of
from minitron_train.data.indexed import IndexedSource
from minitron_train.data.pack import Position
from minitron_train.data.units import UNIT_BYTES, EncodeJob, ReadJob, Split, UnitMaker, permutation
from minitron_train.data.workers import Deferred, Pending, Pool
from minitron_train.runtime.errors import UserError

UNIT_WINDOWS = 32  # least windows per unit, since the rest after its last full window is dropped
BYTES_PER_TOKEN = 4  # typical, of text


@dataclass(frozen=True, slots=True)
class Known:
    """What is found out by reading all files of a blend. Rank 0 does it and tells the others."""

    fingerprint: str  # sha256 of sources, weights and tokenizer
    records: dict[str, FileRecord]  # by path


class Feed:
    """The opened parts of a blend and the processes that tokenise them.

    Args:
        known: from rank 0; None: read the files where that is needed.

    Raises:
        UserError: this rank finds other files than rank 0.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        split: Split,
        num_workers: int,
        seq_length: int,
        known: Known | None = None,
    ) -> None:
        self.parts = sources.parts(data)
        self.opened = [part.open(split) for part in self.parts]
        texts = {i: source for i, source in enumerate(self.opened) if not isinstance(source, IndexedSource | HubSource)}
        self.encoder = tokenizers.encoder(tokenizer, data.document_end)
        for source in self.opened:
            if isinstance(source, IndexedSource) and not split.held_out:
                source.warn_without_ends(self.encoder.end)
        self.vocab_size = tokenizers.vocab_size(tokenizer)
        self.told = known
        records = self.told_records()
        for source in self.opened:
            if isinstance(source, IndexedSource | HubSource):
                source.records = records
        watches = {i: Watch(paths, records) for i, text in texts.items() if (paths := sources.files_to_watch(text))}
        self.chats = {
            i: tokenizers.chat_format(part.name, part.config, tokenizer, seq_length)
            for i, part in enumerate(self.parts)
            if part.is_chat
        }
        self.pool = Pool(UnitMaker(texts, self.encoder, split, watches, self.chats), num_workers)
        self.unit_bytes = max(UNIT_BYTES, UNIT_WINDOWS * BYTES_PER_TOKEN * seq_length)

    def units(self, i: int, seed: int, start: Position | None) -> Iterator[tuple[Position, Pending]]:
        """Endless units of source i from a position on; every epoch has another order."""
        position = start or {"epoch": 0, "unit": 0}
        while True:
            yield from self.epoch(i, (seed, zlib.crc32(self.parts[i].name.encode())), position)
            position = {"epoch": position["epoch"] + 1, "unit": 0}

    def epoch(self, i: int, seed: tuple[int, ...], start: Position) -> Iterator[tuple[Position, Pending]]:
        """Units of source i from a position to the end of its epoch."""
        source, epoch, first = self.opened[i], start["epoch"], start["unit"]
        if isinstance(source, HubSource):
            for unit, (rows, texts) in enumerate(source.units(start.get("rows"), self.unit_bytes), start=first):
                job = EncodeJob(i, texts, (*seed, epoch, unit))
                yield {"epoch": epoch, "unit": unit, "rows": rows}, self.pool.submit(job)
            return
        num_units = self.num_units(i)
        assert num_units
        chosen = np.array_split(permutation(source.num_blocks, *seed, epoch), num_units)
        for unit, blocks in enumerate(chosen[first:], start=first):
            unit_seed = (*seed, epoch, unit)
            if isinstance(source, IndexedSource):
                pending: Pending = Deferred(partial(source.unit, blocks, unit_seed, self.vocab_size))
            else:
                pending = self.pool.submit(ReadJob(i, tuple(blocks.tolist()), unit_seed))
            yield {"epoch": epoch, "unit": unit}, pending

    def num_units(self, i: int) -> int | None:
        """Units per pass over source i; None for the hub, where it is unknown until the end."""
        source = self.opened[i]
        if isinstance(source, HubSource):
            return None
        blocks_per_unit = max(1, self.unit_bytes // source.block_bytes)
        return max(1, round(source.num_blocks / blocks_per_unit))

    @cached_property
    def known(self) -> Known:
        """What rank 0 has found out, or else what the files say now."""
        if self.told:
            return self.told
        text = sources.fingerprint(self.parts, self.opened) + self.encoder.sha256()
        text += "".join(form.sha256() for form in self.chats.values())
        records = [record for source in self.opened for record in records_of(sources.files_to_watch(source))]
        return Known(hashlib.sha256(text.encode()).hexdigest(), {record.path: record for record in records})

    def told_records(self) -> dict[str, FileRecord] | None:
        """The records of rank 0, which must be of the files that this rank finds; None if this rank reads the files."""
        if self.told is None:
            return None
        found = {str(path) for source in self.opened for path in sources.files_to_watch(source)}
        if others := sorted(found ^ self.told.records.keys()):
            where = "not here, but on rank 0" if others[0] in self.told.records else "here, but not on rank 0"
            raise UserError(f"{others[0]}: is {where}; give all nodes the same files, then start again")
        return self.told.records
