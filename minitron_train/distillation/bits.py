"""Arrays of small integers in as few bits as they need: `width` bits each, lowest bit first, without gaps."""

import numpy as np

MOST_BITS = 32


def bits_for(most: int) -> int:
    """Bits of the numbers 0 … `most`; 0 where only 0 is possible."""
    return int(most).bit_length()


def pack(values: np.ndarray, width: int) -> bytes:
    """Pack non-negative integers below 2^`width`, in ceil(len x width / 8) bytes."""
    assert 0 <= width <= MOST_BITS
    assert not len(values) or (values.min() >= 0 and int(values.max()) >> width == 0)
    bits = np.unpackbits(values.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return np.packbits(bits[:, :width].ravel(), bitorder="little").tobytes()


def num_bytes(count: int, width: int) -> int:
    """Bytes of `count` packed integers."""
    return -(-count * width // 8)


def unpack(data: bytes, count: int, width: int) -> np.ndarray:
    """Inverse of `pack`, as int64."""
    bits = np.zeros((count, MOST_BITS), np.uint8)
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width, bitorder="little")
    bits[:, :width] = flat.reshape(count, width)
    return np.packbits(bits, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.int64)
