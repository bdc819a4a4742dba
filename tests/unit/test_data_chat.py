"""Conversations: ids and counted tokens against transformers, packing, masks of batches, resuming, held-out, mistakes."""

import json
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from minitron_train.config import CalibrationConfig, ChatLoss, DataConfig, SourceConfig, SourceKind, TooLong
from minitron_train.data import chat
from minitron_train.data.calibration import calibration_batches
from minitron_train.data.chat import COUNTED, PADDING, SILENT, ChatFormat, pack
from minitron_train.data.conversations import Conversation, conversation
from minitron_train.data.held_out import kept_tokens
from minitron_train.data.pack import PAD, cut, num_windows
from minitron_train.data.pretokenise import pretokenise
from minitron_train.data.sources import describe, identity, validation_source
from minitron_train.data.stream import TokenStream, run_shares, validation_tokens
from minitron_train.data.tokenizers import chat_format, encoder
from minitron_train.data.units import EncodeJob, Split, Unit, UnitMaker
from minitron_train.runtime.errors import UserError
from minitron_train.train.batches import held_out_batch
from tests.support.chats import CHATS, FORGETFUL, MARKED, TEMPLATES, chat_tokenizer, many_chats, turn
from tests.unit.test_data_resume import boundaries, interrupted
from tests.unit.test_data_stream import texts

SEQ_LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with the first of the templates."""
    return chat_tokenizer(tmp_path_factory.mktemp("chat") / "bpe", TEMPLATES["chatml"], texts(300))


def with_template(tokenizer: Any, template: str, **settings: Any) -> Any:
    """The format of a source that uses a template."""
    tokenizer.chat_template = template
    return chat_format("own", SourceConfig(**settings), tokenizer, 10_000)


def encode(tokenizer: Any, form: Any, messages: list[dict], num_prompt: int = 0) -> tuple[list[int], np.ndarray]:
    """Ids and counts of a conversation."""
    given = Conversation(messages, None, num_prompt)
    text, marked = form.render(given)
    spans = form.spans(given, text, marked, len(text))
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, form.counted(encoding, spans)


def counted_text(tokenizer: Any, form: Any, messages: list[dict], num_prompt: int = 0) -> str:
    """The text of the tokens that count."""
    ids, counts = encode(tokenizer, form, messages, num_prompt)
    return tokenizer.decode([i for i, count in zip(ids, counts, strict=True) if count == COUNTED])


def write(folder: Path, rows: Sequence[Any], name: str = "chats.jsonl", **settings: Any) -> DataConfig:
    """A source of conversations in a file."""
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=20)
    else:
        table = pyarrow.Table.from_pylist(list(rows))
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    source = SourceConfig(path=str(path), kind=SourceKind.chat, **settings)
    return DataConfig(sources={"own": source}, num_workers=0, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(tokenizer, name):
    form = with_template(tokenizer, TEMPLATES[name], loss=ChatLoss.all)
    for messages in CHATS:
        document = conversation({"messages": messages})
        text, _ = form.render(Conversation.of(document))
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if "strftime_now" in TEMPLATES[name]:
            assert "It is 26 Jul 2024." in text
            tokenizer.chat_template = TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_tools_and_named_templates_are_rendered_as_transformers_does(tokenizer):
    templates = {"default": TEMPLATES["chatml"], "tool_use": "{{ tools | tojson }}" + TEMPLATES["chatml"]}
    form = with_template(tokenizer, templates)  # type: ignore[arg-type]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"z": 1, "a": None}}}]
    for given in (tools, json.dumps(tools), None, []):
        text, _ = form.render(Conversation.of(conversation({"messages": CHATS[2], "tools": given})))
        wanted = tools if given else None
        assert text == tokenizer.apply_chat_template(CHATS[2], tools=wanted, tokenize=False)


def test_a_template_that_marks_generation_counts_what_transformers_counts(tokenizer):
    form = with_template(tokenizer, MARKED)
    for messages in CHATS:
        ids, counts = encode(tokenizer, form, messages)
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == found["input_ids"] and counts.tolist() == found["assistant_masks"]
        assert counts.any()


COUNTED_TEXTS = {
    "chatml": "It is 3.<|im_end|>\nStill 3.<|im_end|>\n",
    "headers": "It is 3.<|eot|>Still 3.<|eot|>",
    "brackets": " It is 3.</s> Still 3.</s>",
    "marked": "It is 3.<|im_end|>Still 3.<|im_end|>",
    "forgetful": "It is 3.<|im_end|>\nStill 3.<|im_end|>\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_counts_what_the_setting_says(tokenizer, name):
    messages = [turn("system", "Be good."), turn("user", "a?"), turn("assistant", "It is 3.")]
    messages += [turn("user", "And?"), turn("assistant", "Still 3.")]
    both = COUNTED_TEXTS[name]
    last = both[both.index("Still") - both.startswith(" ") :]
    assert counted_text(tokenizer, with_template(tokenizer, TEMPLATES[name]), messages) == both
    form = with_template(tokenizer, TEMPLATES[name], loss=ChatLoss.last_turn)
    assert counted_text(tokenizer, form, messages) == last
    assert counted_text(tokenizer, form, [*messages, turn("user", "Thanks.")]) == last
    form = with_template(tokenizer, TEMPLATES[name])
    assert counted_text(tokenizer, form, messages, num_prompt=4) == last  # a prompt's answers do not count
    form = with_template(tokenizer, TEMPLATES[name], loss=ChatLoss.all)
    ids, counts = encode(tokenizer, form, messages)
    assert (counts == [SILENT] + [COUNTED] * (len(ids) - 1)).all()
    assert counted_text(tokenizer, form, messages, num_prompt=4).startswith(last)


def test_a_template_that_drops_thinking_needs_another_loss(tokenizer):
    messages = [turn("user", "a?"), turn("assistant", "<think>h</think>It is 3."), turn("user", "b?")]
    messages.append(turn("assistant", "<think>hm</think>Still 3."))
    with pytest.raises(
        ValueError, match=r"renders the first 2 messages differently.*set loss=last_turn or loss=all, or"
    ):
        encode(tokenizer, with_template(tokenizer, FORGETFUL), messages)
    form = with_template(tokenizer, FORGETFUL, loss=ChatLoss.last_turn)
    assert counted_text(tokenizer, form, messages) == "<think>hm</think>Still 3.<|im_end|>\n"


def test_forms_of_rows():
    messages = [turn("system", "s"), turn("user", "a"), turn("assistant", "b")]
    wanted = conversation({"messages": messages, "prompt": "ignored"})
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert conversation({"conversations": sharegpt}) == conversation({"conversations": sharegpt[1:], "system": "s"})
    assert Conversation.of(conversation({"conversations": sharegpt})).messages == [
        {"role": message["role"], "content": message["content"]} for message in Conversation.of(wanted).messages
    ]
    texts_only = Conversation.of(conversation({"prompt": "a", "completion": "b"}))
    assert (texts_only.messages, texts_only.num_prompt) == (messages[1:], 1)
    lists = Conversation.of(conversation({"prompt": messages[:2], "completion": messages[2:]}))
    assert (lists.messages, lists.num_prompt) == (messages, 2)
    from_nulls = conversation({"messages": None, "conversations": sharegpt[1:], "system": "s"})
    assert from_nulls == conversation({"conversations": sharegpt})
    both = [{"role": None, "content": None, **message} for message in sharegpt]  # columns of a table with both forms
    assert conversation({"messages": both}) == conversation({"conversations": sharegpt})
    nothing = {"messages": None, "prompt": "a", "completion": "b"}
    assert conversation(nothing) == conversation({"prompt": "a", "completion": "b"})
    assert conversation({"messages": None}) == conversation({"prompt": None, "completion": None}) == ""
    assert "\ufffd" in conversation({"messages": [turn("user", "\ud83d"), turn("assistant", "b")]})


def test_packing_cuts_no_conversation():
    random = np.random.default_rng(1)
    for _ in range(20):
        size = int(random.integers(4, 40))
        pieces = [np.full(int(n), i + 1, np.int32) for i, n in enumerate(random.integers(1, size + 1, 50))]
        counts = [np.full(len(piece), COUNTED, np.int8) for piece in pieces]
        packed = pack(pieces, counts, size, end=0)
        num_rows, rest = divmod(len(packed.tokens), size)
        assert rest == 1 and packed.ends[-1] == len(packed.tokens) and (np.diff(packed.ends) > 0).all()
        unit = Unit(packed.tokens, packed.ends, packed.counts)
        assert num_windows(unit, size) == num_rows
        rows = packed.tokens[:-1].reshape(num_rows, size)
        for i, piece in enumerate(pieces):
            row, column = np.argwhere(rows == i + 1)[0]
            assert (rows[row, column : column + len(piece)] == i + 1).all() and (rows == i + 1).sum() == len(piece)
        assert ((packed.counts == PADDING) == (packed.tokens == 0)).all()
        used = (rows != 0).sum(1)
        assert sorted(used)[1] * 2 > size or num_rows < 3  # first fit: at most one row is half empty
        window = cut(unit, 0, size)
        assert window.counts is not None and (window.documents[window.tokens == 0] == PAD).all()
    empty = pack([], [], 8, end=0)
    assert num_windows(Unit(empty.tokens, empty.ends, empty.counts), 8) == 0


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats.parquet", "chats.arrow", "hub"])
def test_every_container_gives_the_same_conversations(tmp_path, tokenizer, name):
    tokenizer.chat_template = TEMPLATES["chatml"]
    rows = [{"id": i, "messages": messages} for i, messages in enumerate(many_chats(60))]
    if name == "hub":
        (tmp_path / "repository").mkdir()
        data = write(tmp_path / "repository", rows, "train.jsonl")
        data.sources["own"].path = f"hf://datasets/{tmp_path}/repository"
    else:
        data = write(tmp_path, rows, name)
    stream = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
    unit = next(stream.feed.units(0, 1, None))[1].result()
    rendered = {tokenizer.decode(part) for part in np.split(unit.tokens[:], unit.ends) if len(part)}
    whole = {tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows}
    padding = tokenizer.eos_token
    assert {text for text in rendered if not text.startswith(padding)} < whole and len(rendered & whole) > 50
    assert "conversations, loss on assistant turns" in describe(data)[0]


def test_masks_and_documents_of_a_batch(tmp_path, tokenizer):
    """Text keeps attention over the whole row; a conversation attends to itself, and its answers alone count."""
    tokenizer.chat_template = TEMPLATES["chatml"]
    data = write(tmp_path, [{"messages": messages} for messages in many_chats(80)])
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(200)))
    data.sources["text"] = SourceConfig(path=str(plain))
    batch = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1).next_batch(12)
    assert batch.documents_BS is not None and batch.sources == {"own": 6, "text": 6}
    for row, (tokens, labels, mask, documents) in enumerate(
        zip(batch.tokens_BS, batch.labels_BS, batch.mask_BS, batch.documents_BS, strict=True)
    ):
        if row % 2:
            assert mask.all() and not documents.any()
            continue
        assert mask.any() and not mask.all() and set(mask.tolist()) == {0.0, 1.0}
        for number in documents.unique().tolist():
            ids = tokens[documents == number].tolist()
            text = tokenizer.decode(ids)
            if number == PAD:
                assert set(ids) == {tokenizer.eos_token_id} and not mask[documents == number].any()
                continue
            assert text.startswith("<|im_start|>user") and text.endswith("<|im_end|>\n")
            counted = tokenizer.decode(labels[(documents == number) & (mask == 1)])
            answers = [part.split("<|im_end|>\n")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
            assert counted == "".join(f"{answer}<|im_end|>\n" for answer in answers)
            assert not mask[documents == number][-1]  # its label is the next conversation's


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_inside_a_unit_is_bit_equal(tmp_path, tokenizer, num_workers):
    tokenizer.chat_template = TEMPLATES["chatml"]
    data = replace(write(tmp_path, [{"messages": messages} for messages in many_chats(150)]), num_workers=num_workers)

    def make() -> TokenStream:
        return TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=3)

    expected, _, _ = boundaries(make, 3)
    stops = [1, 2, 2, 5, 9] if not num_workers else [4]
    assert interrupted(make, 3, expected[:12], stops) == []


def test_too_long_conversations_are_cut_or_dropped(tmp_path, tokenizer, capsys):
    tokenizer.chat_template = TEMPLATES["chatml"]
    long = [turn("user", "a?"), turn("assistant", "plain words " * 200)]
    lost = [turn("user", "plain words " * 200), turn("assistant", "never read")]
    rows = [{"messages": messages} for messages in [*[CHATS[0]] * 30, long, lost]] + [{"messages": None}]
    lengths = {}
    for choice in TooLong:
        data = replace(write(tmp_path, rows, too_long=choice), validation_fraction=1e-9)
        stream = TokenStream(data, tokenizer, seq_length=128, seed=1)
        stream.next_batch(1)
        printed = capsys.readouterr().out
        done = {TooLong.cut: "cut", TooLong.drop: "dropped"}[choice]
        assert f"2 of 33 conversations of a unit have more than 128 tokens; those are {done} (too_long)\n" in printed
        assert "1 of 33 documents of a unit are null" in printed
        silent = "1 of 33 conversations of a unit have no token that the loss counts"
        assert (silent in printed) == (choice is TooLong.cut)
        unit = next(stream.feed.units(0, 1, None))[1].result()
        starts, sizes = np.append(0, unit.ends[:-1]), np.diff(unit.ends, prepend=0)
        assert unit.counts is not None
        lengths[choice] = int(sizes[unit.counts[starts] != PADDING].max())
    assert lengths[TooLong.drop] < lengths[TooLong.cut] == 128


def test_thousands_of_turns_are_rendered_as_far_as_they_are_read(tokenizer, monkeypatch):
    """Each turn costs two renderings of all turns before it, so a conversation that is cut must not render them all."""
    tokenizer.chat_template = TEMPLATES["chatml"]
    messages = [turn(("user", "assistant")[i % 2], f"word {i}") for i in range(600)]
    calls, render = [], ChatFormat.render
    monkeypatch.setattr(ChatFormat, "render", lambda *arguments: calls.append(arguments) or render(*arguments))
    found = {}
    for choice, length in [(TooLong.cut, 128), (TooLong.drop, 128), (TooLong.cut, 20_000)]:
        form = chat_format("own", SourceConfig(too_long=choice), tokenizer, length)
        maker = UnitMaker({}, encoder(tokenizer), Split(held_out=False, fraction=0), None, {0: form})
        calls.clear()
        unit = maker.run(EncodeJob(0, (conversation({"messages": messages}),), (1,)))
        found[choice, length] = unit.counts
        assert len(calls) <= {128: 30, 20_000: 602}[length] and bool(len(unit.tokens)) == (choice is TooLong.cut)
    assert (found[TooLong.cut, 128][:128] == found[TooLong.cut, 20_000][:128]).all()


def test_held_out_conversations_keep_masks_and_are_kept(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    data = write(tmp_path, [{"messages": messages} for messages in many_chats(200)])
    data = replace(data, validation_fraction=0.3, validation_tokens=8 * SEQ_LENGTH)
    rows = validation_tokens(data, tokenizer, SEQ_LENGTH, seed=1)
    assert rows.shape == (8, 3, SEQ_LENGTH + 1)
    assert torch.equal(kept_tokens(tmp_path, data, tokenizer, SEQ_LENGTH, 1), rows)
    assert torch.equal(kept_tokens(tmp_path, data, tokenizer, SEQ_LENGTH, 1), rows)
    batch = held_out_batch(rows)
    assert batch.documents_BS is not None and 0.2 < batch.mask_BS.mean() < 0.95
    counted = tokenizer.decode(batch.labels_BS[batch.mask_BS == 1])
    assert "how many" not in counted and "things." in counted
    trained = TokenStream(data, tokenizer, seq_length=SEQ_LENGTH, seed=1)
    unit = next(trained.feed.units(0, 1, None))[1].result()
    train_texts = {tokenizer.decode(part) for part in np.split(unit.tokens[:], unit.ends[:-1])}
    held = {
        tokenizer.decode(row[documents == 0])
        for row, documents in zip(batch.tokens_BS, batch.documents_BS, strict=True)
    }
    assert held and not held & train_texts
    text = replace(data, sources={}, path=str(tmp_path / "plain.jsonl"))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(200)))
    assert validation_tokens(text, tokenizer, SEQ_LENGTH, seed=1).shape == (8, SEQ_LENGTH + 1)


def test_held_out_shares_are_those_of_both_phases(tmp_path, tokenizer):
    """A source that begins late takes part in the validation, with its share of the whole run."""
    tokenizer.chat_template = TEMPLATES["chatml"]
    data = write(tmp_path, [{"messages": messages} for messages in many_chats(200)], weight=0.0, late_weight=0.6)
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(300)))
    data.sources["text"] = SourceConfig(path=str(tmp_path / "plain.jsonl"), weight=2.0, late_weight=0.2)
    data = replace(data, validation_fraction=0.4, validation_tokens=8 * SEQ_LENGTH)
    for late_fraction, wanted in [(0.0, 0), (0.5, 3), (0.9, 5)]:  # 0.75 of the late tokens are conversations
        phased = replace(data, late_fraction=late_fraction)
        rows = kept_tokens(tmp_path, phased, tokenizer, SEQ_LENGTH, 1)
        assert len(rows) == 8
        assert (int((rows[:, 1] == 0).any(1).sum()) if rows.dim() == 3 else 0) == wanted
    assert run_shares([(2.0, 1.0), (1.0, 9.0)], 0.0) == [2.0, 1.0]


def test_a_conversation_of_exactly_a_sequence_is_whole(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    document = conversation({"messages": CHATS[0]})
    length = len(tokenizer.apply_chat_template(CHATS[0], tokenize=True, return_dict=False))
    for seq_length, is_long in [(length, False), (length - 1, True)]:
        form = chat_format("own", SourceConfig(too_long=TooLong.drop), tokenizer, seq_length)
        maker = UnitMaker({}, encoder(tokenizer), Split(held_out=False, fraction=0), None, {0: form})
        unit = maker.run(EncodeJob(0, (document,), (1,)))
        assert (unit.num_long, len(unit.tokens)) == (is_long, 0 if is_long else length + 1)


def test_a_validation_path_is_read_with_the_settings_of_the_sources(tmp_path, tokenizer):
    tokenizer.chat_template = None
    (tmp_path / "own.jinja").write_text(TEMPLATES["headers"])
    rows = [{"messages": messages} for messages in many_chats(60)]
    settings = {"loss": ChatLoss.last_turn, "template": str(tmp_path / "own.jinja"), "too_long": TooLong.drop}
    data = write(tmp_path, rows, **settings)
    other = write(tmp_path, rows, "held.jsonl").sources["own"].path
    data = replace(data, validation_path=other, kind=SourceKind.chat, validation_tokens=2 * SEQ_LENGTH)
    source = validation_source(data)
    assert source.path == other and {name: getattr(source, name) for name in settings} == settings
    tokens = validation_tokens(data, tokenizer, SEQ_LENGTH, seed=1)
    assert "<|head|>user<|/head|>" in tokenizer.decode(tokens[0, 0])


def test_calibration_marks_padding(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    data = write(tmp_path, [{"messages": messages} for messages in many_chats(80)])
    calibration = CalibrationConfig(num_samples=4, micro_batch_size=2, seq_length=SEQ_LENGTH)
    tokens = calibration_batches(calibration, data, tokenizer, seed=1).flatten(0, 1)
    assert (tokens < 0).any() and (tokens[:, 0] >= 0).all()
    assert ((tokens < 0).int().diff(dim=1) >= 0).all()  # padding is at the end


def test_what_decides_the_tokens_is_in_the_fingerprint(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    rows = [{"messages": messages} for messages in many_chats(10)]
    (tmp_path / "other.jinja").write_text(TEMPLATES["marked"])

    def known(**settings: Any) -> tuple[str, dict[str, str]]:
        data = write(tmp_path, rows, **settings)
        return TokenStream(data, tokenizer, seq_length=64, seed=1).known.fingerprint, identity(data)

    variants = [{}, {"loss": ChatLoss.all}, {"too_long": TooLong.drop}, {"template": str(tmp_path / "other.jinja")}]
    found = [known(**settings) for settings in variants]
    assert len({fingerprint for fingerprint, _ in found}) == len({str(parts) for _, parts in found}) == len(variants)
    tokenizer.chat_template = TEMPLATES["headers"]
    assert known()[0] not in {fingerprint for fingerprint, _ in found}


BAD = {
    "role": ({"messages": [turn("narrator", "x")]}, r"messages\[0\] has the role 'narrator'; it must be one of human"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\] has the role None"),
    "empty": ({"messages": [turn("user", " "), turn("assistant", "b")]}, r"messages\[0\] is empty; take the row out"),
    "null": ({"messages": [turn("user", "a"), turn("assistant", None)]}, r"messages\[1\] has no content \(null\)"),
    "number": ({"messages": [turn("user", 3)]}, r"messages\[0\] has content that is not text: 3"),  # type: ignore[arg-type]
    "image": ({"messages": [turn("user", [{"type": "image"}])]}, r"messages\[0\] has content of type 'image'"),  # type: ignore[arg-type]
    "no turns": ({"messages": []}, r"messages has no messages"),
    "text": ({"messages": "hello"}, r"messages is not a list of messages: hello"),
    "lines": ({"messages": "hel\nlo"}, r"messages is not a list of messages: hel lo;"),
    "tool lines": ({"messages": CHATS[0], "tools": "{\n}}"}, r"tools is not JSON: { }};"),
    "long role": ({"messages": [turn("x" * 999, "x")]}, r"messages\[0\] has the role 'x{59}; it must be"),
    "turn": ({"conversations": ["hello"]}, r"conversations\[0\] is not an object: hello"),
    "completion": ({"prompt": "a", "completion": None}, r"completion is not a list of messages: None"),
    "tools": ({"messages": CHATS[0], "tools": "{"}, r"tools is not JSON"),
    "half a pair": ({"prompt": "hello"}, r"prompt without completion: it has prompt; add completion"),
    "text row": ({"text": "hello"}, r"no conversations: it has text; name the column `messages`"),
    "template": (
        {"messages": CHATS[0]},
        r"the chat template rejects it \(no thanks\); correct the row or the template",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_named(tmp_path, tokenizer, name):
    row, says = BAD[name]
    tokenizer.chat_template = "{{ raise_exception('no thanks') }}" if name == "template" else TEMPLATES["chatml"]
    good = [] if name == "template" else [{"messages": messages} for messages in many_chats(3)]
    data = write(tmp_path, [*good, row])
    data = replace(data, validation_fraction=1e-9)
    with pytest.raises(UserError, match=rf"chats\.jsonl, line {len(good) + 1}: {says}") as error:
        TokenStream(data, tokenizer, seq_length=64, seed=1).next_batch(1)
    assert "\n" not in str(error.value)


HOSTILE = {
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        r"rejects it \(after 0 s: it has not ended\); correct",
    ),
    "is huge": ("{{ 'a' * 10**10 }}", r"needs more than 1\.1.GB of memory; correct it"),
    "pads": ("{{ 'a' | center(10**10) }}", r"needs more than 1\.1.GB of memory; correct it"),
    "reads objects": ("{{ messages.__init__.__globals__ }}", r"rejects it \(access to attribute '__init__'"),
    "reads files": ("{% include '/etc/passwd' %}", r"rejects it \(no loader"),
    "raises lines": ("{{ raise_exception('a\\nb') }}", r"rejects it \(a\); correct"),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_line(tmp_path, tokenizer, monkeypatch, name, num_workers):
    template, says = HOSTILE[name]
    if num_workers and name == "loops":
        pytest.skip("a worker has the limit of a minute")
    monkeypatch.setattr(chat, "RENDER_S", 0.2)
    tokenizer.chat_template = template
    data = replace(write(tmp_path, [{"messages": CHATS[0]}]), num_workers=num_workers, validation_fraction=1e-9)
    stream = TokenStream(data, tokenizer, seq_length=64, seed=1)
    with pytest.raises(UserError, match=rf"chats\.jsonl, line 1: the chat template {says}") as error:
        stream.next_batch(1)
    stream.close()
    assert "\n" not in str(error.value)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "the limit of memory has ended"


def test_other_mistakes(tmp_path, tokenizer):
    data = write(tmp_path, [{"messages": messages} for messages in many_chats(3)])
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"has no chat template for conversations; set data\.sources\.NAME\.template to a file"
    ):
        TokenStream(data, tokenizer, seq_length=64, seed=1)
    data.sources["own"].template = str(tmp_path / "nowhere.jinja")
    with pytest.raises(UserError, match=r"own\.template=.*nowhere\.jinja: cannot be read \(No such file"):
        TokenStream(data, tokenizer, seq_length=64, seed=1)
    tokenizer.chat_template = TEMPLATES["chatml"]
    with pytest.raises(UserError, match=r"pretokenise: \.bin/\.idx holds no loss mask"):
        pretokenise(
            replace(data, sources={"own": replace(data.sources["own"], template=None)}), tokenizer, tmp_path / "o"
        )
    with pytest.raises(UserError, match=r"no column text, but conversations \(messages\); set kind=chat"):
        TokenStream(
            DataConfig(path=data.sources["own"].path, num_workers=0), tokenizer, seq_length=64, seed=1
        ).next_batch(1)
    own = DataConfig(path=data.sources["own"].path, kind=SourceKind.chat, num_workers=0, validation_fraction=1e-9)
    assert TokenStream(own, tokenizer, seq_length=64, seed=1).next_batch(1).documents_BS is not None
    (tmp_path / "a.csv").write_text("messages\nx\n")
    with pytest.raises(UserError, match=r"csv holds no conversations \(kind=chat\); give JSON Lines"):
        TokenStream(DataConfig(path=str(tmp_path / "a.csv"), kind=SourceKind.chat), tokenizer, seq_length=64, seed=1)
    with pytest.raises(UserError, match=r"sources\.a\.template=t: applies to conversations alone"):
        DataConfig(sources={"a": SourceConfig(path="x", template="t")}).validate()
