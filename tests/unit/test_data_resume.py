"""Resuming: with any number of interruptions anywhere, the stream of every kind of source is the uninterrupted one."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from minitron_train.config import DataConfig, SourceConfig, SourceKind
from minitron_train.data.stream import Batch, TokenStream
from minitron_train.runtime.errors import UserError
from tests.unit.test_data_stream import texts, write_source

pytestmark = pytest.mark.usefixtures("small_units")

SEQ_LENGTH, NUM_BATCHES = 64, 40
DATA_SETS = ["hub", "hub_parquet", "hub_blank_rows", "hub_exact_units"]
FILES = ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "parquet", "bin", "embedded"]
TENSORS = ("tokens_BS", "labels_BS", "mask_BS", "documents_BS")


def data_set(folder: Path, kind: str) -> DataConfig:
    """A local folder in the hub's form: three Parquet shards with several row groups, or JSON with rows without text."""
    folder.mkdir()
    rows: list[str | None] = [*texts(100)]
    if kind == "hub_blank_rows":
        rows[::5] = [None] * len(rows[::5])
        rows[1::7] = [""] * len(rows[1::7])
    if kind == "hub_exact_units":  # the last unit ends with the last row
        rows = [f"{i:03d} " + "plain words " * 41 + "abcd" for i in range(60)]
    for shard in range(3):
        part = rows[shard * len(rows) // 3 : (shard + 1) * len(rows) // 3]
        if kind == "hub_blank_rows":
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
            (folder / f"train-{shard}.jsonl").write_text(lines)
        else:
            path = folder / f"train-{shard:05d}-of-00003.parquet"
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), path, row_group_size=9)
    return DataConfig(sources={"own": SourceConfig(path=str(folder), kind=SourceKind.hub)}, num_workers=0)


def source(folder: Path, kind: str, tokenizer) -> DataConfig:
    """Some 40 kB of documents in a source of this kind: a pass of a few units."""
    if kind.startswith("hub_"):
        return data_set(folder / kind, kind)
    return write_source(folder, kind, texts(100), tokenizer)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal to the last bit, with the numbers of their documents."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in TENSORS]
    equal = [left is right if left is None or right is None else torch.equal(left, right) for left, right in pairs]
    return all(equal) and one.sources == other.sources


def interrupted(make: Callable[[], TokenStream], rows: int, expected: list[Batch], stops: list[int]) -> list[int]:
    """Batches that differ from the expected ones when the stream is saved, made anew and loaded before each of `stops`.

    A stop that stands twice in the list is an interruption without progress.
    """
    stream, differ = make(), []
    for number, batch in enumerate(expected):
        for _ in range(stops.count(number)):
            state = json.loads(json.dumps(stream.state_dict()))
            stream.close()
            stream = make()
            stream.load_state_dict(state)
            assert json.loads(json.dumps(stream.state_dict())) == state and len(json.dumps(state)) < 2000
        if not same(stream.next_batch(rows), batch):
            differ.append(number)
    stream.close()
    return differ


def boundaries(make: Callable[[], TokenStream], rows: int) -> tuple[list[Batch], list[int], int]:
    """The uninterrupted batches, the numbers of those beside the end of a unit, and the epoch that the last one is of."""
    stream, batches, ends, before = make(), [], [], None
    for number in range(NUM_BATCHES):
        batches.append(stream.next_batch(rows))
        position = [
            packer.position and (packer.position["epoch"], packer.position["unit"]) for packer in stream.packers
        ]
        if position != before:
            ends += [number, number + 1]
        before = position
    stream.close()
    assert len(ends) > 2, "the test must leave the first unit"
    return batches, ends, max(place[0] for place in before or () if place)


@pytest.mark.parametrize("kind", [*DATA_SETS, *FILES])
def test_interruptions_change_no_batch(kind, tmp_path, tokenizer):
    """At the start, inside and at the ends of units and epochs, at random places, twice at one place, in every epoch."""
    data = replace(source(tmp_path, kind, tokenizer), document_attention=True)

    def make() -> TokenStream:
        return TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3)

    rows = 60 if kind == "embedded" else 24  # its blocks are larger
    expected, ends, epoch = boundaries(make, rows)
    assert epoch >= 2 or kind == "embedded", "the test must reach the third pass"
    draw = random.Random(kind)
    for stops in ([0, 1, 1, *ends[-2:]], [*draw.sample(range(NUM_BATCHES), 4), *draw.choices(ends, k=2)]):
        assert not interrupted(make, rows, expected, stops), stops


def test_rows_that_cannot_be_read_are_one_line(tmp_path, tokenizer):
    """A damaged shard, and rows without the column, name the data set and the remedy."""
    data = data_set(tmp_path / "damaged", "hub_parquet")
    (tmp_path / "damaged/train-00002-of-00003.parquet").write_bytes(b"PAR1, but no more")
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3)
    with pytest.raises(
        UserError, match=r"^data.sources.own: .*damaged: .*start again to resume at the last checkpoint$"
    ):
        stream.next_batch(400)
    data = data_set(tmp_path / "json", "hub_blank_rows")
    data.sources["own"].text_key = "body"
    with pytest.raises(UserError, match=r"json: no column body: it has text; set text_key"):
        TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3).next_batch(1)


@pytest.mark.parametrize("kind", ["jsonl", "hub_parquet"])
def test_passes_are_reported_once(kind, tmp_path, tokenizer, capsys):
    """One line when a pass begins, also over a resume; the number of passes follows from the windows that were taken."""
    data = source(tmp_path, kind, tokenizer)
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3)
    name, taken, started = stream.packers[0].name, 0, []
    for _ in range(40):
        stream.next_batch(24)
        taken += 24
        state = json.loads(json.dumps(stream.state_dict()))
        stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3)
        stream.load_state_dict(state)
        started.append(state["sources"][name]["position"]["epoch"] + 1)
    stream.next_batch(24)
    found = stream.passes()[name]
    assert found["tokens_per_pass"] and found["passes"]
    assert abs(found["passes"] - (taken + 24) * SEQ_LENGTH / found["tokens_per_pass"]) < 0.1
    said = [line for line in capsys.readouterr().out.splitlines() if "begins" in line]
    numbers = [number for number in (2, 3, 4, 8) if number <= max(started)]
    assert [line.split("pass ")[1].split()[0] for line in said] == [str(number) for number in numbers]
    assert said[0].startswith(f"data: {name}: pass 2 begins; a pass has ")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_documents_without_text_are_reported_once(num_workers, tmp_path, tokenizer, capsys):
    """null, empty and blank texts are counted in the unit that has them, in every process that reads; the others say nothing."""
    rows: list[str | None] = [*texts(100)]
    rows[::5] = [None] * 20
    rows[1::10], rows[2::10] = [""] * 10, [" \n"] * 10
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    stream = TokenStream(DataConfig(path=str(path), num_workers=num_workers), tokenizer, seq_length=SEQ_LENGTH, seed=3)
    for _ in range(3):
        stream.next_batch(300)
    stream.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "null" in line]
    assert said == ["data: own: 31 of 75 documents of a unit are null, empty or blank; such documents are left out"]
