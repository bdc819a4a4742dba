"""Fixtures of the tests of the data stream."""

import pytest
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A tokenizer of 400 entries, trained on the texts of the stream's tests."""
    from minitron_train.data import tokenizers
    from tests.unit.test_data_stream import texts

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.save(tokenizers.train_bpe(texts(300), 400), folder / "bpe")
    return tokenizers.load(folder / "bpe")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units in a pass over a small corpus."""
    monkeypatch.setattr("minitron_train.data.feed.UNIT_BYTES", 10_000)
