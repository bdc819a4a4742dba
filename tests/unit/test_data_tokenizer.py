"""Tokenizers: trained on the spot, opened, checked."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_train.data import corpus, tokenizers
from minitron_train.data.units import Split, UnitMaker
from minitron_train.runtime.errors import UserError


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


def rewritten(folder: Path, source: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a tokenizer's folder with another tokenizer.json."""
    shutil.copytree(source, folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    edit(made)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def with_pad(folder: Path, source: Path) -> Path:
    """The same tokenizer with [PAD] as one more entry."""
    tokenizer = tokenizers.load(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


def test_an_added_token_beyond_the_rows_may_not_stand_in_a_text(folder, tmp_path, capsys):
    """As of many fine-tuned models whose embedding was not resized; transformers opens and runs them."""
    padded = tokenizers.load(with_pad(tmp_path / "padded", folder))
    tokenizers.check_tokenizer(padded, 512)
    assert (
        "512 rows and none for '[PAD]' (1 added tokens); a text that holds one is rejected" in capsys.readouterr().out
    )
    maker = UnitMaker({}, tokenizers.encoder(padded), Split(held_out=False, fraction=0))
    assert maker.encode(["plain text"]).tokens[:].max() < 512
    with pytest.raises(
        UserError, match=r"holds the token '\[PAD\]' with id 512, but the model's embedding has 512 rows"
    ):
        maker.encode(["plain text", "an [PAD] inside"])
    with pytest.raises(UserError, match=r"holds the token '\[PAD\]'"):
        tokenizers.encoder(padded, "[PAD]")
    with pytest.raises(UserError, match=r"ids up to 512.*500 rows"):
        tokenizers.check_tokenizer(padded, 500)


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_read_as_transformers_reads_them(folder, tmp_path, split):
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"split_special_tokens": split}
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, text = tokenizers.load(copy), "before</s>after"
    encoder = tokenizers.encoder(tokenizer)
    unit = UnitMaker({}, encoder, Split(held_out=False, fraction=0)).encode([text])
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert unit.tokens[:].tolist() == [*wanted, tokenizer.eos_token_id]
    assert (tokenizer.eos_token_id in wanted) is not split
    assert (encoder.sha256() == tokenizers.encoder(tokenizers.load(folder)).sha256()) is not split


def test_a_hole_in_the_vocabulary_does_not_shorten_it(folder, tmp_path):
    def hole(made: dict[str, Any]) -> None:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in made["model"]["merges"]]
        used = {piece for pair in pairs for piece in pair}
        name = next(token for token, i in made["model"]["vocab"].items() if 300 < i < 500 and token not in used)
        del made["model"]["vocab"][name]
        made["model"]["merges"] = [pair for pair in pairs if "".join(pair) != name]

    tokenizer = tokenizers.load(rewritten(tmp_path / "hole", folder, hole))
    assert (len(tokenizer), tokenizers.vocab_size(tokenizer)) == (511, 512)


def test_tokenizers_of_a_student_and_a_teacher(folder, tmp_path):
    """Refused where a text would get other ids; more tokens than the other has are padding."""
    tokenizer = tokenizers.load(folder)
    tokenizers.check_same(tokenizer, folder)
    tokenizers.check_same(tokenizer, tmp_path / "has none")
    tokenizers.check_same(tokenizer, with_pad(tmp_path / "padded", folder))
    tokenizers.check_same(tokenizers.load(tmp_path / "padded"), folder)

    def swap(made: dict[str, Any]) -> None:
        vocab = made["model"]["vocab"]
        names = {i: token for token, i in vocab.items()}
        vocab[names[400]], vocab[names[401]] = 401, 400

    def shift(made: dict[str, Any]) -> None:
        made["model"]["merges"].insert(0, made["model"]["merges"].pop())

    def other_spaces(made: dict[str, Any]) -> None:
        made["pre_tokenizer"]["add_prefix_space"] = True

    for edit, message in (
        (swap, "have different tokenizers: id 400 is '.*' in one and '.*' in the other; distil with"),
        (shift, "the ids agree, but not the model's merges; distil with"),
        (other_spaces, "the ids agree, but not the pre_tokenizer; distil with"),
    ):
        other = rewritten(tmp_path / edit.__name__, folder, edit)
        with pytest.raises(UserError, match=message) as caught:
            tokenizers.check_same(tokenizer, other)
        assert "\n" not in str(caught.value)


def test_a_config_that_transformers_refuses_is_not_the_tokenizers_fault(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for key, value in {
        "use_cache": "yes",
        "eos_token_id": "2",
        "id2label": {"a": "b"},
        "use_return_dict": False,
    }.items():
        (copy / "config.json").write_text(json.dumps({"model_type": "llama", key: value}))
        with pytest.raises(UserError, match=r"config\.json: transformers rejects it .*; correct it") as caught:
            tokenizers.load(copy)
        assert "\n" not in str(caught.value)
    (copy / "config.json").write_text(json.dumps({"model_type": "of nobody", "use_cache": "yes"}))
    assert tokenizers.load(copy).vocab_size == tokenizers.load(folder).vocab_size


def test_a_sentencepiece_model_alone_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        tokenizers.load(tmp_path)
