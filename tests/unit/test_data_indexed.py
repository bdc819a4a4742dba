"""megatron-core's .bin/.idx pairs: whole documents, end tokens, and files that are damaged or change."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from minitron_train.config import DataConfig
from minitron_train.data import tokenizers
from minitron_train.data.feed import Feed
from minitron_train.data.indexed import HEADER, IndexedSource
from minitron_train.data.stream import TokenStream
from minitron_train.data.units import Split
from minitron_train.runtime.errors import UserError

ALL = Split(held_out=False, fraction=0)
NUM_DOCUMENTS = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    tokenizers.save(tokenizers.train_bpe(["some words"], 258), folder)
    return tokenizers.load(folder)


def write_pair(prefix: Path, lengths: list[int], end: int | None) -> Path:
    """Document k is the token 100 + k over and over in sequences of these lengths, and then `end`."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number in range(NUM_DOCUMENTS):
        tokens = np.full(sum(lengths), 100 + number)
        if end is not None:
            tokens[-1] = end
        builder.add_document(tokens, lengths)  # type: ignore[arg-type]  # it makes a numpy array of whatever comes
    builder.finalize(f"{prefix}.idx")
    return prefix


def documents(source: IndexedSource) -> list[list[int]]:
    """Every document's tokens, in the order of the file."""
    return [source.read(i, 0, int(length), 400).tolist() for i, length in enumerate(source.lengths)]


def test_documents_of_several_sequences_stay_whole(tmp_path, tokenizer):
    """The same documents in one sequence or in six give the same batches."""
    end, rows = tokenizer.eos_token_id, {}
    for name, lengths in {"one": [61], "six": [10, 10, 0, 10, 20, 11]}.items():
        prefix = write_pair(tmp_path / name, lengths, end)
        assert documents(IndexedSource([prefix], ALL)) == [[100 + k] * 60 + [end] for k in range(NUM_DOCUMENTS)]
        stream = TokenStream(DataConfig(path=str(prefix), num_workers=0), tokenizer, seq_length=50, seed=1)
        rows[name] = stream.next_batch(32).tokens_BS.tolist()
    assert rows["one"] == rows["six"]


def rewrite(prefix: Path, pointers: Any = None, lengths: Any = None, bounds: Any = None, **header: int) -> None:
    """Replace arrays and numbers of an index."""
    path = prefix.with_name(prefix.name + ".idx")
    raw = path.read_bytes()
    names = ("magic", "version", "dtype", "num_sequences", "num_documents")
    old = dict(zip(names, HEADER.unpack(raw[: HEADER.size]), strict=True))
    arrays, at = [], HEADER.size
    kinds = (np.int32, old["num_sequences"], lengths), (np.int64, old["num_sequences"], pointers)
    for kind, count, new in (*kinds, (np.int64, old["num_documents"], bounds)):
        array = np.frombuffer(raw, kind, count, at).copy()
        at += array.nbytes
        arrays.append(array if new is None else np.asarray(new(array), kind))
    path.write_bytes(HEADER.pack(*(old | header).values()) + b"".join(array.tobytes() for array in arrays))


def test_sequences_in_another_order(tmp_path):
    """Offsets are followed, wherever the sequences lie."""
    prefix = write_pair(tmp_path / "a", [3, 4], 7)
    whole = documents(IndexedSource([prefix], ALL))
    rewrite(prefix, pointers=lambda old: np.concatenate([old[14:], old[:14]]))
    assert documents(IndexedSource([prefix], ALL)) == whole[7:] + whole[:7]


def with_one(at: int, value: int) -> Any:
    """A change of one number of an array."""

    def change(old: np.ndarray) -> np.ndarray:
        old[at] = value
        return old

    return change


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "version 2, dtype 8; version 1 and integers"),
    "dtype": ({"dtype": 99}, "dtype 99"),
    "floats": ({"dtype": 7}, "dtype 7"),
    "count": ({"num_sequences": 2**63}, r"cut off"),
    "documents": ({"num_documents": 10**12}, r"cut off"),
    "negative_length": ({"lengths": with_one(3, -5)}, "negative lengths or offsets"),
    "negative_pointer": ({"pointers": with_one(3, -2)}, "negative lengths or offsets"),
    "long": ({"lengths": with_one(3, 2**31 - 1)}, r"a\.bin: [\d,]+ bytes, its \.idx promises"),
    "far": ({"pointers": with_one(3, 2**63 - 1)}, r"a\.bin: [\d,]+ bytes, its \.idx promises"),
    "bounds_fall": ({"bounds": with_one(3, 20)}, "its documents are not its 80 sequences, in order"),
    "bounds_beyond": ({"bounds": with_one(-1, 999)}, "its documents are not its 80 sequences, in order"),
    "no_bounds": (
        {"bounds": lambda old: old[:1], "num_documents": 1},
        "its documents are not its 80 sequences, in order",
    ),
    "bounds_short": ({"bounds": with_one(0, 1)}, "its documents are not its 80 sequences, in order"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_indexes(case, tmp_path):
    changes, expected = DAMAGES[case]
    prefix = write_pair(tmp_path / "a", [3, 4], 7)
    rewrite(prefix, **changes)
    with pytest.raises(UserError, match=expected) as error:
        _ = IndexedSource([prefix], ALL).num_blocks
    assert "\n" not in str(error.value)


def test_tokens_that_are_cut_off_or_deleted(tmp_path):
    """Before the run and in the middle of it: one line, never a killed process."""
    prefix = write_pair(tmp_path / "a", [61], 7)
    source, tokens = IndexedSource([prefix], ALL), tmp_path / "a.bin"
    assert source.read(0, 0, 61, 400)[-1] == 7
    tokens.write_bytes(tokens.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"a\.bin: changed after this run had opened it \(had [\d,]+ bytes, has"):
        source.read(NUM_DOCUMENTS - 1, 0, 61, 400)
    with pytest.raises(UserError, match=r"a\.bin: [\d,]+ bytes, its \.idx promises"):
        _ = IndexedSource([prefix], ALL).num_blocks
    tokens.unlink()
    with pytest.raises(UserError, match=r"a\.bin: (cannot be read \(No such file|was deleted after this run)"):
        _ = IndexedSource([prefix], ALL).num_blocks


def test_pairs_without_end_tokens_are_reported(tmp_path, tokenizer, capsys):
    """Once for training; not for the held-out part of the same pair."""
    for name, end in {"with": tokenizer.eos_token_id, "without": None}.items():
        data = DataConfig(path=str(write_pair(tmp_path / name, [5], end)), num_workers=0)
        for held_out in (False, True):
            Feed(data, tokenizer, Split(held_out=held_out, fraction=0.1), 0, 16)
    line = f"warning: {tmp_path}/without.bin: none of 40 documents ends with the end-of-document token"
    said = capsys.readouterr().out
    assert said.startswith(line) and said.count("\n") == 1 and "--append-eod" in said


def test_header_is_megatrons():
    assert HEADER.size == struct.calcsize("<9sQBQQ") == 34
