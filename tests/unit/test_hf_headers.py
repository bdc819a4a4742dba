"""Headers of safetensors files: damaged and hostile ones are one line."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_train.hf import SINGLE, read_header
from minitron_train.runtime.errors import UserError


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def raw(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def one(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


DAMAGED_HEADERS = {
    "negative size": header(a=one(shape=[-2])),
    "size that is no number": header(a=one(shape=["2"])),
    "fraction": header(a=one(shape=[2.5])),
    "offset backwards": header(a=one(data_offsets=[8, 0])),
    "offset below zero": header(a=one(data_offsets=[-8, 0])),
    "three offsets": header(a=one(data_offsets=[0, 4, 8])),
    "unknown type": header(a=one(dtype="F33")),
    "type that is no word": header(a=one(dtype=32)),
    "more bytes than its size": header(a=one(shape=[1])),
    "huge size": header(a=one(shape=[2**62, 2**62])),
    "a hundred dimensions": header(a=one(shape=[1] * 100)),
    "a hole": header(a=one(data_offsets=[8, 16])) + bytes(8),
    "overlap": header(a=one(), b=one()),
    "a size of a thousand digits": header(a=one(shape=[10**1000])),
    "more values than any file": header(a=one(shape=[2**62] * 16)),
    "values that end inside a byte": header(a=one(dtype="F4", shape=[15])),
    "a field twice": raw(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
    "metadata twice": raw(b'{"__metadata__": {}, "__metadata__": {}, "a": ' + json.dumps(one()).encode() + b"}"),
    "minus nothing": raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-0, 8]}}'),
    "metadata of numbers": header(__metadata__={"a": 1}, a=one()),
    "a list": struct.pack("<Q", 2) + b"[]",
    "null": struct.pack("<Q", 4) + b"null",
    "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "not UTF-8": struct.pack("<Q", 6) + b'{"\xff":',
}


@pytest.mark.parametrize("kind", DAMAGED_HEADERS)
def test_damaged_headers_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / SINGLE).write_bytes(DAMAGED_HEADERS[kind] + bytes(8))
    with pytest.raises(UserError, match=r"its header is corrupt.*; download it again") as caught:
        read_header(tmp_path / SINGLE)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "large",
    [
        header(__metadata__={"a": "{" * 5_000_000}, a=one()),
        header(__metadata__={"a": '\\"' * 1_000_000}, a=one()),
        header(__metadata__={str(i): "{" for i in range(100_000)}, a=one()),
        header(a=one(), **{f"b{i}": one(shape=[0], data_offsets=[8, 8]) for i in range(20_000)}),
    ],
    ids=["brackets in a string", "quotes in a string", "many strings", "many empty tensors"],
)
def test_a_large_header_takes_no_time(tmp_path: Path, large: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(large + bytes(8))
    start_s = time.process_time()
    assert "a" in read_header(tmp_path / SINGLE)
    assert time.process_time() - start_s < 2


def test_a_tensor_twice_in_one_header_is_refused(tmp_path: Path) -> None:
    text = json.dumps(one())
    twice = f'{{"a": {text}, "a": {json.dumps(one(data_offsets=[8, 16]))}}}'.encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(twice)) + twice + bytes(16))
    with pytest.raises(UserError, match="tensor a takes 8 bytes and must begin at byte 0, its offsets are 8 to 16"):
        read_header(tmp_path / SINGLE)
