"""The stream: pure function of its inputs, split over ranks, phases, held out; resuming is in test_data_resume."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch

from minitron_train.config import DataConfig, SourceConfig, SourceKind
from minitron_train.data import tokenizers
from minitron_train.data.blend import Blend
from minitron_train.data.pack import cut, num_windows
from minitron_train.data.stream import TokenStream, validation_tokens
from minitron_train.data.units import Unit
from minitron_train.runtime.errors import UserError

SEQ_LENGTH = 64


def texts(count: int, tag: str = "") -> list[str]:
    """Documents of many lengths in several scripts; each names its number."""
    words = ["наука", "φύσις", "データ", "def f(x):\n\treturn x**2\n", "naïve", "🙂🙃", "plain words"]
    return [f"{tag}{i}: " + " ".join(words[(i * j) % 7] for j in range(1, 10 + i % 50)) for i in range(count)]


def write_source(folder: Path, kind: str, documents: list[str], tokenizer) -> DataConfig:
    """A source of the given kind, and a section that reads it."""
    path = folder / f"corpus.{kind}"
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode()
    plain = "\n\n".join(documents).encode()
    match kind:
        case "embedded":
            return DataConfig(num_workers=0)
        case "parquet":
            table = pyarrow.table({"text": documents})
            pyarrow.parquet.write_table(table, path, row_group_size=20)
        case "bin":
            path = write_indexed(folder / "corpus", documents, tokenizer)
        case "hub":
            path = folder / "repository"
            path.mkdir()
            shards = lines.splitlines(keepends=True)
            for number in range(3):
                (path / f"train-{number}.jsonl").write_bytes(b"".join(shards[number::3]))
            source = SourceConfig(path=str(path), kind=SourceKind.hub)
            return DataConfig(sources={"hub": source}, num_workers=0, cache_dir=str(folder / "cache"))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "txt.gz":
            path.write_bytes(gzip.compress(plain))
        case "jsonl.zst":
            with pyarrow.output_stream(str(path), compression="zstd") as stream:
                stream.write(lines)
        case _:
            path.write_bytes(lines if kind == "jsonl" else plain)
    return DataConfig(path=str(path), num_workers=0, cache_dir=str(folder / "cache"))


def write_indexed(prefix: Path, documents: list[str], tokenizer) -> Path:
    """The .bin/.idx pair that Megatron's preprocessing would write."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for text in documents:
        ids = np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        builder.add_document(ids, [len(ids)])  # type: ignore[arg-type]  # it makes a numpy array of whatever comes
    builder.finalize(f"{prefix}.idx")
    return prefix


def digest(stream: TokenStream, num_batches: int, size: int = 4) -> list[str]:
    """sha256 of each of the next batches."""
    batches = [stream.next_batch(size) for _ in range(num_batches)]
    return [hashlib.sha256(b.tokens_BS.numpy().tobytes() + b.labels_BS.numpy().tobytes()).hexdigest() for b in batches]


def test_workers_change_nothing(tmp_path, tokenizer):
    """0, 1 and 3 tokenising processes give the same batches, and end with the stream."""
    data = write_source(tmp_path, "jsonl", texts(600), tokenizer)
    digests = []
    for num_workers in (0, 1, 3):
        stream = TokenStream(replace(data, num_workers=num_workers), tokenizer, seq_length=SEQ_LENGTH, seed=1)
        digests.append(digest(stream, 5))
        processes = [worker.process for worker in stream.feed.pool.workers]
        assert len(processes) == num_workers
        stream.close()
        assert [process.poll() for process in processes] == [0] * num_workers
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.races
def test_workers_end_with_a_killed_process(tmp_path, tokenizer):
    """After kill -9 of the training process no tokenising process is left behind."""
    data = write_source(tmp_path, "jsonl", texts(600), tokenizer)
    code = (
        "import sys, time; from minitron_train.config import DataConfig; from minitron_train.data import tokenizers;"
        "from minitron_train.data.stream import TokenStream;"
        "data = DataConfig(path=sys.argv[1], num_workers=2);"
        "stream = TokenStream(data, tokenizers.load(sys.argv[2]), seq_length=64, seed=1); stream.next_batch(4);"
        "print(*[worker.process.pid for worker in stream.feed.pool.workers], flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(data.path), tokenizer.name_or_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    for worker in workers:
        for _ in range(200):
            if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"worker {worker.pid} still runs")


@pytest.mark.parametrize("kind", ["jsonl", "bin"])
def test_ranks_share_each_batch(kind, tmp_path, tokenizer):
    """Rank r has rows r, r + dp_size, … of the batch that one rank would have; nothing twice, nothing left out."""
    data = write_source(tmp_path, kind, texts(400), tokenizer)
    one = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
    four = [TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1, dp_rank=r, dp_size=4) for r in range(4)]
    for _ in range(3):
        whole = one.next_batch(8)
        for rank, stream in enumerate(four):
            part = stream.next_batch(8)
            assert torch.equal(part.tokens_BS, whole.tokens_BS[rank::4])
            assert part.sources == whole.sources
        assert all(stream.state_dict() == one.state_dict() for stream in four)
    four[2].load_state_dict(one.state_dict())
    assert torch.equal(four[2].next_batch(8).tokens_BS, one.next_batch(8).tokens_BS[2::4])


def test_every_byte_arrives_once(tmp_path, tokenizer):
    """The windows of an epoch, put back in order and decoded, are the corpus: no byte of any script lost or doubled."""
    documents = texts(500)
    for kind in ("jsonl", "jsonl.gz", "parquet", "bin"):
        folder = tmp_path / kind
        folder.mkdir()
        data = replace(write_source(folder, kind, documents, tokenizer), validation_fraction=0.0)
        unit = next(TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).feed.units(0, 1, None))[1].result()
        pieces = tokenizer.decode(unit.tokens[:]).split(tokenizer.eos_token)
        assert pieces[-1] == "" and sorted(pieces[:-1]) == sorted(documents)
        expected = [tuple(cut(unit, i, SEQ_LENGTH).tokens.tolist()) for i in range(num_windows(unit, SEQ_LENGTH))]
        joined = [expected[0][0], *(token for window in expected for token in window[1:])]
        assert joined == unit.tokens[: len(joined)].tolist() and len(unit.tokens) - len(joined) < SEQ_LENGTH
        batch = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).next_batch(len(expected))
        rows = [
            (*inputs, labels[-1])
            for inputs, labels in zip(*(x.tolist() for x in (batch.tokens_BS, batch.labels_BS)), strict=True)
        ]
        assert rows != expected and sorted(rows) == sorted(expected)
        assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])


def test_text_files_keep_their_bytes(tmp_path, tokenizer):
    """A text file longer than a block is cut at line ends only."""
    lines = [text.replace("\n", " ") for text in texts(900)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    data = DataConfig(path=str(tmp_path), num_workers=0, validation_fraction=0.0)
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
    unit = next(stream.feed.units(0, 1, None))[1].result()
    decoded = tokenizer.decode(unit.tokens[:]).split(tokenizer.eos_token)
    assert sorted(line for piece in decoded for line in piece.splitlines() if line) == sorted(lines)


def test_seed_and_epoch_change_the_order(tmp_path, tokenizer):
    data = write_source(tmp_path, "jsonl", texts(300), tokenizer)
    first = [digest(TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=seed), 1) for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]
    units = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).feed.units(0, 1, None)
    (_, one), (_, two) = next(units), next(units)
    tokens = [np.asarray(unit.result().tokens[:]) for unit in (one, two)]
    assert sorted(tokens[0]) == sorted(tokens[1]) and not np.array_equal(*tokens)


def test_held_out_documents_are_never_trained_on(tmp_path, tokenizer):
    """Validation tokens decode to documents that no epoch of training contains, and are the same for every call."""
    data = replace(write_source(tmp_path, "jsonl", texts(400), tokenizer), validation_fraction=0.2)
    held = validation_tokens(data, tokenizer, SEQ_LENGTH, seed=5)
    assert held.shape[1] == SEQ_LENGTH + 1 and held.dtype == torch.int64
    assert torch.equal(held, validation_tokens(data, tokenizer, SEQ_LENGTH, seed=5))
    names = {piece.split(":")[0] for row in held for piece in tokenizer.decode(row).split(tokenizer.eos_token)[1:-1]}
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
    unit = next(stream.feed.units(0, 1, None))[1].result()
    trained = {piece.split(":")[0] for piece in tokenizer.decode(unit.tokens[:]).split(tokenizer.eos_token)}
    assert len(names) > 10 and len(trained) > 250 and names.isdisjoint(trained)
    own = tmp_path / "own.txt"
    own.write_text("held out\n" * 500)
    replaced = validation_tokens(replace(data, validation_path=str(own)), tokenizer, SEQ_LENGTH, seed=5)
    assert "held out" in tokenizer.decode(replaced[0])


def two_sources(folder: Path, **weights) -> DataConfig:
    """Sources a and b with their own documents."""
    for name in "ab":
        lines = [json.dumps({"text": text}) for text in texts(300, tag=name)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    sources = {name: SourceConfig(path=str(folder / f"{name}.jsonl"), **weights[name]) for name in "ab"}
    return DataConfig(sources=sources, num_workers=0)


def test_validation_takes_each_source_by_its_weight(tmp_path, tokenizer):
    """As many sequences as were asked for, the remainder of the division included."""
    for weights, total in (((1, 1), 1), ((1, 1), 7), ((3, 1), 6)):
        data = two_sources(tmp_path, a={"weight": weights[0]}, b={"weight": weights[1]})
        data = replace(data, validation_tokens=total * SEQ_LENGTH, validation_fraction=0.5)
        rows = [tokenizer.decode(row) for row in validation_tokens(data, tokenizer, SEQ_LENGTH, seed=5)]
        assert len(rows) == total
        assert abs(sum("a" in row.split(":")[0] for row in rows) - total * weights[0] / sum(weights)) <= 1


@pytest.mark.parametrize("held_out", [False, True])
def test_tokens_of_another_tokenizer_are_refused(held_out, tmp_path, tokenizer):
    """A pair may have been made with a larger vocabulary: neither the stream nor validation passes such ids on."""
    data = write_source(tmp_path, "bin", texts(400), tokenizer)
    data = replace(data, validation_fraction=0.5)
    small = tokenizers.train_bpe(["some words"], 258)
    tokenizers.save(small, tmp_path / "small")
    small = tokenizers.load(tmp_path / "small")
    with pytest.raises(
        UserError, match=r"\.bin: token \d+ is outside the tokenizer's vocabulary of 258 entries; .*with"
    ):
        if held_out:
            validation_tokens(data, small, SEQ_LENGTH, seed=1)
        else:
            TokenStream(data, small, seq_length=SEQ_LENGTH, seed=1).next_batch(4)


def test_a_cut_off_pair_is_refused(tmp_path, tokenizer):
    data = write_source(tmp_path, "bin", texts(400), tokenizer)
    (file,) = tmp_path.rglob("*.bin")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"\.bin: .* bytes, its \.idx promises .*; copy both again"):
        TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).next_batch(4)


def test_weights_hold_at_every_moment(tmp_path, tokenizer):
    data = two_sources(tmp_path, a={"weight": 3}, b={"weight": 1})
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
    drawn = 0
    for batch in range(1, 20):
        drawn += stream.next_batch(7).sources["a"]
        assert abs(drawn - 0.75 * 7 * batch) < 1


def test_late_phase(tmp_path, tokenizer):
    """The last quarter of the tokens has the late weights; a stream resumed there has them too."""
    data = two_sources(tmp_path, a={"weight": 1}, b={"weight": 0, "late_weight": 1})
    data = replace(data, late_fraction=0.25)
    total = 16 * SEQ_LENGTH
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1, total_tokens=total)
    assert stream.next_batch(12).sources == {"a": 12}
    state = stream.state_dict()
    assert stream.next_batch(4).sources == {"a": 2, "b": 2}
    resumed = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1, total_tokens=total)
    resumed.load_state_dict(state)
    assert resumed.next_batch(4).sources == {"a": 2, "b": 2}
    with pytest.raises(UserError, match="late_fraction"):
        TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)


def test_blend_is_within_one_of_its_weights():
    blend = Blend(weights=[(0.5, 0), (0.3, 0), (0.2, 0)], late_start=None)
    counts = [0, 0, 0]
    for n in range(1, 1000):
        counts[blend.draw()] += 1
        assert all(abs(count - n * share) <= 1 for count, share in zip(counts, (0.5, 0.3, 0.2), strict=True))


def test_document_attention(tmp_path, tokenizer):
    """Documents count up after each EOS, labels across a boundary are masked."""
    data = replace(write_source(tmp_path, "jsonl", texts(300), tokenizer), document_attention=True)
    batch = TokenStream(data, tokenizer, seq_length=256, seed=1).next_batch(8)
    assert batch.documents_BS is not None
    ends = batch.tokens_BS == tokenizer.eos_token_id
    assert torch.equal(batch.mask_BS == 0, ends)
    starts = torch.zeros_like(ends)
    starts[:, 0], starts[:, 1:] = True, ends[:, :-1]
    assert torch.equal(batch.documents_BS, starts.cumsum(1) - 1)
    assert int(ends.sum()) > 10


def test_every_sequence_begins_with_the_token_that_the_user_names(tmp_path, tokenizer):
    """It replaces the first token, which is the last label of another sequence; held-out sequences have it too."""
    plain = write_source(tmp_path, "jsonl", texts(300), tokenizer)
    data = replace(plain, sequence_start=tokenizer.eos_token)
    streams = [TokenStream(one, tokenizer, seq_length=SEQ_LENGTH, seed=1) for one in (plain, data)]
    before, after = (stream.next_batch(8) for stream in streams)
    end = tokenizer.eos_token_id
    assert (after.tokens_BS[:, 0] == end).all() and not (before.tokens_BS[:, 0] == end).all()
    assert torch.equal(after.tokens_BS[:, 1:], before.tokens_BS[:, 1:])
    assert torch.equal(after.labels_BS, before.labels_BS)
    assert streams[0].fingerprint() != streams[1].fingerprint()
    held = [validation_tokens(one, tokenizer, SEQ_LENGTH, seed=5) for one in (plain, data)]
    assert (held[1][:, 0] == end).all() and torch.equal(held[0][:, 1:], held[1][:, 1:])
    own = replace(data, validation_path=str(next(tmp_path.glob("*.jsonl"))))
    assert (validation_tokens(own, tokenizer, SEQ_LENGTH, seed=5)[:, 0] == end).all()
    with pytest.raises(UserError, match=r"data\.sequence_start=<no>: not a token of this tokenizer"):
        TokenStream(replace(data, sequence_start="<no>"), tokenizer, seq_length=SEQ_LENGTH, seed=1)


def test_a_batch_mixes_documents(tmp_path, tokenizer):
    """Neighbouring rows come from all over the corpus, not from one long document."""
    for name in range(40):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"file {name} line {i}" for i in range(500)))
    batch = TokenStream(
        DataConfig(path=str(tmp_path), num_workers=0), tokenizer, seq_length=SEQ_LENGTH, seed=1
    ).next_batch(32)
    files = {tokenizer.decode(row).split("file ")[1].split()[0] for row in batch.tokens_BS}
    assert len(files) > 12


def test_windows_of_a_unit():
    """Windows overlap by one token and number their documents; the rest of the unit is left out."""
    unit = Unit(np.arange(23, dtype=np.int32), np.array([5, 6, 17, 23]))
    windows = [cut(unit, i, 4) for i in range(num_windows(unit, 4))]
    assert [window.tokens.tolist() for window in windows] == [list(range(4 * i, 4 * i + 5)) for i in range(5)]
    assert [window.documents.tolist() for window in windows] == [
        [0, 0, 0, 0, 0],
        [0, 1, 2, 2, 2],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1],
    ]
    assert [num_windows(Unit(np.arange(n), np.array([n])), 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_state_of_other_data_is_refused(tmp_path, tokenizer):
    data = write_source(tmp_path, "jsonl", texts(300), tokenizer)
    state = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).state_dict()
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="differ from the checkpoint"):
        TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).load_state_dict(state)
