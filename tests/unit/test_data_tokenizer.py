"""Tokenizers: trained on the spot, opened, checked."""

import contextlib
import json
import shutil

import pytest

from minitron_train.data import corpus
from minitron_train.data import tokenizer as tokenizers
from minitron_train.errors import UserError


def texts() -> list[str]:
    """Half a megabyte of the embedded corpus."""
    return [text for path in corpus.modules()[:80] for text in corpus.documents(path, "prose")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    tokenizers.save(tokenizers.train_bpe(texts(), 512), folder)
    return folder


def test_trained_tokenizer(folder):
    """Exactly as many entries as asked for, every byte comes back, special tokens known, the same when trained again."""
    tokenizer = tokenizers.load(folder)
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 512
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    for text in ("def f(x):\n\treturn x\n", "наука データ 🙂", "".join(map(chr, range(1, 500))), "  spaces  "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer(texts()[0])["input_ids"]) < 0.7 * len(texts()[0])
    again = tokenizers.train_bpe(texts(), 512)
    assert json.loads(again.to_str())["model"] == json.loads((folder / "tokenizer.json").read_text())["model"]


def test_code_of_a_folder_is_never_run(folder, tmp_path, monkeypatch):
    copy = tmp_path / "with_code"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["own.Own", "own.Own"]}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": auto_map, "tokenizer_class": "Own"}))
    (copy / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(UserError):
        tokenizers.load(copy)
    assert not (tmp_path / "ran").exists()


def test_hash_follows_the_tokens(folder, tmp_path):
    tokenizers.save(tokenizers.train_bpe(texts(), 511), tmp_path / "other")
    paths = (folder, folder, tmp_path / "other")
    one, same, other = (tokenizers.encoder(tokenizers.load(path)).sha256() for path in paths)
    assert one == same != other


def test_beginning_and_end_of_documents(folder):
    """BOS only for tokenizers that add it themselves; EOS, or the token that is configured."""
    tokenizer = tokenizers.load(folder)
    assert tokenizers.encoder(tokenizer).start == ()
    assert tokenizers.encoder(tokenizer).end == tokenizer.eos_token_id
    assert tokenizers.encoder(tokenizer, "<s>").end == tokenizer.bos_token_id
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizers.encoder(tokenizer).start == (0,)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no EOS.*data\.document_end"):
        tokenizers.encoder(tokenizer)
    with pytest.raises(UserError, match="nonsense"):
        tokenizers.encoder(tokenizer, "nonsense")


def test_mistakes(folder, tmp_path):
    tokenizer = tokenizers.load(folder)
    tokenizers.check_tokenizer(tokenizer, 512)
    with pytest.raises(UserError, match=r"ids up to 511.*500 rows"):
        tokenizers.check_tokenizer(tokenizer, 500)
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match="cannot be opened"):
        tokenizers.load(tmp_path)
    with pytest.raises(UserError, match="at least 258"):
        tokenizers.train_bpe(texts(), 100)
    with pytest.raises(UserError, match="gives only"):
        tokenizers.train_bpe(["too short"], 512)
