"""The stream on real text: books and manuals in compressed files, blended, held out, resumed."""

import json

import pytest
import torch

from minitron_train.config import DataConfig, SourceConfig
from minitron_train.data import tokenizers
from minitron_train.data.stream import TokenStream, validation_tokens

pytestmark = pytest.mark.needs_data


def test_blend_of_real_sources(data, tmp_path):
    """Manuals and a play at 3:1, validated on WikiText-2; resumed deep inside, with two workers instead of none."""
    corpus = data / "corpus"
    sources = {
        "manuals": SourceConfig(path=str(corpus / "*_doc*.jsonl.gz"), weight=3),
        "play": SourceConfig(path=str(corpus / "tinyshakespeare.txt")),
    }
    wikitext = str(corpus / "valid_wikitext2.jsonl.gz")
    section = DataConfig(sources=sources, validation_path=wikitext, num_workers=0, cache_dir=str(tmp_path / "cache"))
    sample = (corpus / "tinyshakespeare.txt").read_text()[:300_000]
    tokenizers.save(tokenizers.train_bpe([sample], 1024), tmp_path / "bpe")
    tokenizer = tokenizers.load(tmp_path / "bpe")
    stream = TokenStream(section, tokenizer, seq_length=512, seed=3)
    for _ in range(20):
        batch = stream.next_batch(64)
        assert batch.sources == {"manuals": 48, "play": 16}
    state = json.loads(json.dumps(stream.state_dict()))
    expected = stream.next_batch(64)
    section.num_workers = 2
    resumed = TokenStream(section, tokenizer, seq_length=512, seed=3)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next_batch(64).tokens_BS, expected.tokens_BS)
    resumed.close()
    held = validation_tokens(section, tokenizer, 512, seed=3)
    assert held.shape == (64, 513) and "ROMEO" not in tokenizer.decode(held.flatten())
