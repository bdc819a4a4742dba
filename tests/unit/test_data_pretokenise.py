"""Text -> .bin/.idx -> stream: the same documents, and nothing half-written."""

import json
from pathlib import Path

import pytest

from minitron_train.config import DataConfig
from minitron_train.data import tokenizers
from minitron_train.data.pretokenise import pretokenise
from minitron_train.data.stream import TokenStream
from minitron_train.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    tokenizers.save(tokenizers.train_bpe(["some words"], 258), folder)
    return tokenizers.load(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pair_holds_every_document(num_workers, tmp_path, tokenizer):
    documents = [f"{i} слово " * (i % 30 + 1) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prefix = tmp_path / "pairs" / "a"
    counts = pretokenise(DataConfig(path=str(tmp_path / "a.jsonl"), num_workers=num_workers), tokenizer, prefix)
    assert sorted(file.name for file in prefix.parent.iterdir()) == ["a.bin", "a.idx"]
    data = DataConfig(path=str(prefix), validation_fraction=0)
    stream = TokenStream(data, tokenizer, seq_length=64, seed=1)
    unit = next(stream.feed.units(0, 1, None))[1].result()
    pieces = tokenizer.decode(unit.tokens[:]).split(tokenizer.eos_token)
    assert sorted(pieces[:-1]) == sorted(documents)
    assert counts == {"documents": 400, "tokens": len(unit.tokens)} and (unit.tokens[:][unit.ends - 1] == 1).all()


def test_a_mistake_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nplain\n')
    with pytest.raises(UserError, match="not a JSON object"):
        pretokenise(DataConfig(path=str(tmp_path / "a.jsonl"), num_workers=0), tokenizer, tmp_path / "pairs" / "a")
    assert not (tmp_path / "pairs").exists()
    with pytest.raises(UserError, match="num_workers=-1: must not be negative"):
        pretokenise(DataConfig(path=str(tmp_path / "a.jsonl"), num_workers=-1), tokenizer, tmp_path / "a")


def test_an_output_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text\n")
    data = DataConfig(path=str(tmp_path / "a.txt"), num_workers=0)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt/pair"):
        pretokenise(data, tokenizer, tmp_path / "a.txt" / "pair")


def test_a_kill_between_the_files_leaves_no_mixed_pair(tmp_path, tokenizer, monkeypatch):
    """New tokens never lie beside the old index."""
    (tmp_path / "a.txt").write_text("some text\n")
    data = DataConfig(path=str(tmp_path / "a.txt"), num_workers=0)
    pretokenise(data, tokenizer, tmp_path / "pair")
    rename = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        pretokenise(data, tokenizer, tmp_path / "pair")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("pair")] == ["pair.bin"]


def test_a_pair_without_sequences(tmp_path, tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(str(tmp_path / "a.bin")).finalize(str(tmp_path / "a.idx"))
    (tmp_path / "a.bin").write_bytes(b"left over")
    with pytest.raises(UserError, match=r"has 0 tokens"):
        TokenStream(DataConfig(path=str(tmp_path / "a")), tokenizer, seq_length=64, seed=1).next_batch(1)
