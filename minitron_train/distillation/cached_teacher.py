"""A teacher whose predictions come from a teacher cache: its layers are not in memory."""

# B sequences, S tokens of a sequence, N = S * B tokens, D teacher's hidden size, K most ids of a token
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitron_train.data.stream import Batch
from minitron_train.distillation.cache_files import DIGEST_BYTES, REMEDY, CacheFormat, CacheReader, Row
from minitron_train.distillation.samples import Samples
from minitron_train.hf import DTYPES
from minitron_train.model.vocabulary import OutputLayer
from minitron_train.runtime.errors import UserError

NOTHING = Row(payload=b"", digest=b"", entropy=0.0)


def digests(batch: Batch) -> list[bytes]:
    """A hash of each sequence: its tokens, its labels, which of them count, and its documents."""
    columns = [batch.tokens_BS, batch.labels_BS, (batch.mask_BS != 0).long()]
    columns += [] if batch.documents_BS is None else [batch.documents_BS]
    rows = torch.stack(columns, dim=1).cpu().numpy()  # [B, columns, S]
    return [hashlib.blake2b(row.tobytes(), digest_size=DIGEST_BYTES).digest() for row in rows]


def valid_tokens(batch: Batch) -> list[Tensor]:
    """The numbers of each sequence's tokens that the loss counts, on the CPU."""
    return [row.nonzero()[:, 0] for row in batch.mask_BS.cpu()]


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedTeacher:
    """What a teacher said about one split of a cache.

    Attributes:
        output: this rank's rows of the teacher's output layer, none but on the last pipeline stage; None where samples are
            read.
    """

    reader: CacheReader
    format: CacheFormat
    output: OutputLayer | None
    device: torch.device

    def rows(self, batch: Batch) -> list[Row]:
        """What is stored of each sequence; nothing of one with a negative number, which fills up its batch.

        Raises:
            UserError: the sequences are not those that the teacher has seen, or a file is damaged.
        """
        assert batch.numbers_B is not None
        numbers = batch.numbers_B.tolist()
        rows = [self.reader.row(number) if number >= 0 else NOTHING for number in numbers]
        for number, row, digest in zip(numbers, rows, digests(batch), strict=True):
            if number >= 0 and row.digest != digest:
                raise UserError(
                    f"{self.reader.folder}: sequence {number} has other tokens there than in this run; give the text, tokenizer "
                    "and settings that `teach` had, or run `teach` again"
                )
        return rows

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [N, D], bit for bit as the teacher gave them; 0 at tokens that the loss does not count."""
        num_rows, length = batch.tokens_BS.shape
        width, dtype = self.format.hidden_size, DTYPES[self.format.dtype]
        states_BSD = torch.zeros(num_rows, length, width, dtype=dtype)
        for states_SD, row, valid in zip(states_BSD, self.rows(batch), valid_tokens(batch), strict=True):
            if len(row.payload) != len(valid) * self.format.hidden_bytes:
                raise self.damaged(f"{len(row.payload)} bytes for {len(valid)} tokens")
            if len(valid):
                found = torch.frombuffer(bytearray(row.payload), dtype=dtype)
                states_SD[valid] = found.view(len(valid), width)
        return states_BSD.transpose(0, 1).flatten(0, 1).to(self.device)

    def samples(self, batch: Batch) -> Samples:
        """Samples of all tokens; those that the loss does not count have the weight 0."""
        num_rows, length = batch.tokens_BS.shape
        rows = self.rows(batch)
        decoded: list[tuple[np.ndarray, np.ndarray]] = []
        for row, valid in zip(rows, valid_tokens(batch), strict=True):
            try:
                parts = self.format.layout.decode(row.payload, len(valid))
            except ValueError as error:
                raise self.damaged(str(error)) from error
            decoded.append(parts)
        most = max(ids.shape[1] for ids, _ in decoded)
        ids_SBK = torch.zeros(length, num_rows, most, dtype=torch.int64)
        weights_SBK = torch.zeros(length, num_rows, most)
        for b, ((ids, weights), valid) in enumerate(zip(decoded, valid_tokens(batch), strict=True)):
            ids_SBK[valid, b, : ids.shape[1]] = torch.from_numpy(ids)
            weights_SBK[valid, b, : ids.shape[1]] = torch.from_numpy(weights)
        return Samples(
            ids_NK=ids_SBK.flatten(0, 1).to(self.device),
            weights_NK=weights_SBK.flatten(0, 1).to(self.device),
            entropy=sum(row.entropy for row in rows),
        )

    def damaged(self, why: str) -> UserError:
        """The error for bytes that are whole but do not fit."""
        return UserError(f"{self.reader.folder}: damaged ({why}); {REMEDY}")
