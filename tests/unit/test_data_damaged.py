"""Files that are damaged, cut or hostile: all of their documents, or one line."""

import bz2
import gzip
import json
import lzma
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from minitron_train.config import DataConfig, SourceConfig
from minitron_train.data import lines, packed
from minitron_train.data.indexed import IndexedSource
from minitron_train.data.sources import parts
from minitron_train.data.units import Split
from minitron_train.runtime.errors import UserError

ALL = Split(held_out=False, fraction=0)
TEXTS = [f"text number {i} of a few" for i in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(path: Path, **settings) -> list[str]:
    """All documents of a path, in the order of its blocks."""
    data = DataConfig(path=str(path), num_workers=0, cache_dir=str(path.parent / "cache"), **settings)
    (part,) = parts(data)
    source = part.open(ALL)
    assert not isinstance(source, IndexedSource)
    return ["".join(passages) for block in range(source.num_blocks) for passages in source.read(block)]


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def several(compress) -> list[bytes]:
    """Two members of one file."""
    return [compress(LINES[:50_000]), compress(LINES[50_000:])]


@pytest.mark.parametrize(
    ("suffix", "compress", "padding"),
    [("bz2", bz2.compress, b""), ("xz", lzma.compress, b"\0" * 8), ("gz", gzip.compress, b"\0" * 8)],
)
def test_files_of_several_members(suffix, compress, padding, tmp_path):
    """Every member is read, padding or not; damage in or after a later member is an error, never the end of the file."""
    first, second = several(compress)
    for name, raw in (("a", first + second), ("b", first + padding + second + padding)):
        assert read(write(tmp_path / f"{name}.jsonl.{suffix}", raw)) == TEXTS, name
    for name, raw in (
        ("c", first + b"garb" + second),
        ("e", first + second[:-20]),
        ("f", first + second + b"garbage!"),
    ):
        with pytest.raises(
            UserError, match=r"cannot be decompressed .*; the file is corrupt: fetch or write it again$"
        ):
            read(write(tmp_path / f"{name}.jsonl.{suffix}", raw))


def copy_in(folder: Path) -> Path:
    (copy,) = (folder / "cache").glob("*.blocks")
    return copy


@pytest.mark.parametrize("cut", [slice(0), slice(7), slice(-1), slice(-30), slice(1, None)])
def test_a_cut_copy_is_made_again(cut, tmp_path, capsys):
    """A copy without a true end is no copy: the source is copied again, and said so."""
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    read(path)
    copy = copy_in(tmp_path)
    whole = copy.read_bytes()
    copy.write_bytes(whole[cut])
    capsys.readouterr()
    assert read(path) == TEXTS and copy.read_bytes() == whole
    assert "copying" in capsys.readouterr().out


def test_copies_of_two_formats_coexist(tmp_path, monkeypatch):
    """A version with another format neither reads nor replaces this version's copy in a shared cache."""
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    read(path)
    copy = copy_in(tmp_path)
    content = copy.read_bytes()
    monkeypatch.setattr(lines, "COPY_END", b"blocks-3")
    assert read(path) == TEXTS
    assert len(list(copy.parent.glob("*.blocks"))) == 2
    assert copy.read_bytes() == content


def test_every_damaged_byte_of_a_copy_is_noticed(tmp_path):
    """Bytes of a frame, of its head and of the offsets: one line or a new copy, never other text."""
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    read(path)
    copy = copy_in(tmp_path)
    whole = copy.read_bytes()
    for at in [0, 4, *range(8, len(whole) - 60, len(whole) // 12), *range(len(whole) - 60, len(whole), 5)]:
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            assert read(path) == TEXTS, at
        except UserError as error:
            assert "delete it and start again" in str(error), at
    copy.write_bytes(whole)


def test_a_frame_of_another_text_is_noticed(tmp_path):
    """zstd has no checksum here: the copy has its own."""
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    read(path)
    copy = copy_in(tmp_path)
    raw = copy.read_bytes()
    crc = zlib.crc32(LINES[:10]).to_bytes(4, "little")
    copy.write_bytes(raw[:4] + crc + raw[8:])
    with pytest.raises(UserError, match="the checksum differs"):
        read(path)


def test_long_lines_in_compressed_files(tmp_path, monkeypatch):
    """Text is cut while it is read, so that memory is bounded; a line of another format is refused when it is too long."""
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 300_000)
    monkeypatch.setattr(lines, "PIECE_BYTES", 10_000)
    monkeypatch.setattr("minitron_train.data.formats.PIECE_BYTES", 70_000)
    text = "word " * 100_000
    assert "".join(read(write(tmp_path / "a.txt.gz", gzip.compress(text.encode())))).replace("\n", "") == text
    for name in ("b.jsonl.gz", "c.csv.gz"):
        line = json.dumps({"text": text}) if "json" in name else f'id,text\n1,"{text}"'
        with pytest.raises(UserError, match=rf"{name}: a line or document of over 300\.0 kB; split it"):
            read(write(tmp_path / name, gzip.compress(line.encode())))


def test_a_line_as_long_as_memory_allows_is_not_joined_again_for_each_piece(tmp_path, monkeypatch):
    """Reading a line is linear in its length."""
    monkeypatch.setattr(lines, "PIECE_BYTES", 1)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b"a" * 20_000))
    assert [len(line) for line in lines.decompressed_lines(path)] == [20_000]


def arrow_stream(path: Path, table: pyarrow.Table) -> Path:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


def test_damaged_offsets_of_arrow_are_one_line(tmp_path):
    """Offsets that point outside of the column would be followed; they are checked first."""
    path = arrow_stream(tmp_path / "a.arrow", pyarrow.table({"text": TEXTS[:40]}))
    raw = bytearray(path.read_bytes())
    at = raw.index(np.arange(3, dtype="<i4").tobytes()[:4] + np.int32(len(TEXTS[0])).tobytes())
    raw[at + 4 : at + 40] = b"\xff" * 36
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"not a whole Arrow file .*; the file is corrupt"):
        read(path)


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    arrow_stream(tmp_path / "a.arrow", table)
    write(tmp_path / "a.csv", b"text,text\na,b\n")
    for name in ("a.parquet", "a.arrow", "a.csv"):
        with pytest.raises(UserError, match=rf"{name}: 2 columns are called text; rename all but one"):
            read(tmp_path / name)


def test_headers_of_csv(tmp_path):
    """A header of over 4 kB, one with quoted newlines, and old Mac line ends."""
    many = ",".join(f"column{i}" for i in range(2000))
    assert read(write(tmp_path / "a.csv", f"{many},text\n{',' * 2000}abc\n".encode())) == ["abc"]
    assert read(write(tmp_path / "b.csv", b'"id\nof it",text\n1,abc\n')) == ["abc"]
    with pytest.raises(UserError, match=r"c\.csv, line 1: has carriage returns alone; end lines with a newline"):
        read(write(tmp_path / "c.csv", b"id,text\r1,abc\r"))
    with pytest.raises(UserError, match=r"d\.csv: no column text: it has column0, .* …; set text_key$") as error:
        read(write(tmp_path / "d.csv", f"{many}\n".encode()))
    assert len(str(error.value)) < 700


def test_a_number_that_python_does_not_parse(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: cannot be parsed .*4300 digits.*; take the line out"):
        read(write(tmp_path / "a.jsonl", b'{"text": "abc", "x": %s}' % (b"1" * 5000)))


def test_negative_tokens_are_refused(tmp_path):
    """-1 would be the last row of an embedding, or a crash on a GPU."""
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([5, -6, 7] * 20), [60])
    builder.finalize(str(tmp_path / "a.idx"))
    source = IndexedSource([tmp_path / "a"], ALL)
    with pytest.raises(UserError, match=r"a\.bin: token -6 is outside the tokenizer's vocabulary of 400 entries"):
        _ = source.unit([0], (1,), 400).tokens[:10]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_weights_are_finite(weight):
    for source in (SourceConfig(path="a", weight=weight), SourceConfig(path="a", weight=1.0, late_weight=weight)):
        with pytest.raises(UserError, match=r"data\.sources\.a\.weight=.*must be a finite number of at least 0"):
            DataConfig(sources={"a": source}).validate()


def test_members_are_read_in_parts_of_any_size(monkeypatch):
    """Where the pieces of the file end changes nothing."""
    monkeypatch.setattr(packed, "PIECE_BYTES", 7)
    import io

    raw = bz2.compress(b"one") + bz2.compress(b"") + bz2.compress(b"two")
    assert packed.open_members(bz2.BZ2Decompressor, io.BytesIO(raw)).read() == b"onetwo"
