"""The bytes of a sequence's samples: repeated draws are stored once, with their number.

Four arrays follow each other, each in whole bytes:

    distinct ids of each token, less 1     bits_for(draws - 1) each
    ids, ascending for each token          bits_for(vocab_size - 1) each
    draws of each id, less 1               bits_for(draws - 1) each
    or, where draws are not equal, weights float16 each

Legend: T tokens, K draws of a token or most ids of one, D ids of all tokens.
"""

from dataclasses import dataclass

import numpy as np

from minitron_train.config.teach import most_sample_bytes
from minitron_train.distillation import bits

WEIGHT = np.dtype("<f2")  # a relative error below 2^-11


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleLayout:
    """What the bytes of all sequences have in common.

    Attributes:
        has_weights: each id has a weight; otherwise its number of draws.
    """

    vocab_size: int
    draws: int
    has_weights: bool

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return bits.bits_for(self.vocab_size - 1)

    @property
    def count_bits(self) -> int:
        """Bits of a number of draws or of distinct ids, less 1."""
        return bits.bits_for(self.draws - 1)

    @property
    def most_bytes(self) -> float:
        """Bytes of a token all of whose draws differ."""
        return most_sample_bytes(self.vocab_size, self.draws, has_weights=self.has_weights)

    def encode(self, ids_TK: np.ndarray, ratios_TK: np.ndarray) -> bytes:
        """Bytes of the draws of T tokens; each draw weighs its ratio / K."""
        order = np.argsort(ids_TK, axis=1, kind="stable")
        ids_TK, ratios_TK = (np.take_along_axis(values, order, axis=1) for values in (ids_TK, ratios_TK))
        is_new_TK = np.ones(ids_TK.shape, bool)
        is_new_TK[:, 1:] = ids_TK[:, 1:] != ids_TK[:, :-1]
        places = np.flatnonzero(is_new_TK)
        counts = np.diff(places, append=ids_TK.size)
        weights = ratios_TK.ravel()[places] * counts / self.draws
        return self.encode_distinct(
            is_new_TK.sum(axis=1), ids_TK.ravel()[places], weights if self.has_weights else counts
        )

    def encode_distinct(self, numbers_T: np.ndarray, ids_D: np.ndarray, values_D: np.ndarray) -> bytes:
        """Bytes of distinct ids with their weights, or numbers of draws."""
        parts = [bits.pack(numbers_T - 1, self.count_bits), bits.pack(ids_D, self.id_bits)]
        values = values_D.astype(WEIGHT).tobytes() if self.has_weights else bits.pack(values_D - 1, self.count_bits)
        return b"".join([*parts, values])

    def decode(self, data: bytes, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [T, K] and weights float32 [T, K]; K is the largest number of ids, and weight 0 fills up.

        Raises:
            ValueError: the bytes are not those of `num_tokens` tokens of this vocabulary.
        """
        split = bits.num_bytes(num_tokens, self.count_bits)
        numbers_T = bits.unpack(data[:split], num_tokens, self.count_bits) + 1
        num_ids = int(numbers_T.sum())
        middle = split + bits.num_bytes(num_ids, self.id_bits)
        tail = num_ids * WEIGHT.itemsize if self.has_weights else bits.num_bytes(num_ids, self.count_bits)
        if len(data) != middle + tail:
            raise ValueError(f"{len(data)} bytes where {middle + tail} are needed")
        ids_D = bits.unpack(data[split:middle], num_ids, self.id_bits)
        if num_ids and ids_D.max() >= self.vocab_size:
            raise ValueError(f"token id {ids_D.max()} of {self.vocab_size}")
        if self.has_weights:
            weights_D = np.frombuffer(data[middle:], WEIGHT).astype(np.float32)
        else:
            weights_D = (bits.unpack(data[middle:], num_ids, self.count_bits) + 1).astype(np.float32) / self.draws
        return padded(numbers_T, ids_D), padded(numbers_T, weights_D)


def padded(numbers_T: np.ndarray, values_D: np.ndarray) -> np.ndarray:
    """The values of each token as a row, filled up with 0."""
    table = np.zeros((len(numbers_T), int(numbers_T.max(initial=1))), values_D.dtype)
    table[np.arange(table.shape[1]) < numbers_T[:, None]] = values_D
    return table
