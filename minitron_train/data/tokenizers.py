"""Tokenizers: open them, check them against the model, train one for recipes that download nothing."""

import hashlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minitron_train.config import DataConfig, SourceConfig
from minitron_train.data.chat import ChatFormat, read_template
from minitron_train.data.units import Encoder, check_ids
from minitron_train.hf import read_json
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_folder
from minitron_train.runtime.records import joined

BOS, EOS = "<s>", "</s>"
NUM_ROWS = "num_embedding_rows"  # attribute of a tokenizer with ids beyond its model's embedding rows
KNOWN_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` entries: <s>, </s>, 256 bytes, merges. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size}: byte-level BPE has at least {smallest} entries; set a larger one")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise UserError(f"vocab_size={vocab_size}: the corpus gives only {found} entries; give more text")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int = 4096) -> None:
    """Write a folder that AutoTokenizer opens (tokenizer.json, tokenizer_config.json, special_tokens_map.json)."""
    with atomic_folder(folder) as scratch:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=max_length
        )
        fast.save_pretrained(scratch)


def load(folder: Path | str) -> PreTrainedTokenizerBase:
    """Open the folder's tokenizer. It must be a fast one (tokenizer.json); nothing is downloaded."""
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: no tokenizer ({KNOWN_FILES[0]}); copy the model's, or give calibration.tokens_path")
    needs_sentencepiece = not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tekken.json"))
    if needs_sentencepiece and find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder}: the tokenizer is a sentencepiece model without a tokenizer.json; pip install sentencepiece, or "
            "save it once with transformers"
        )
    check_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the class depends on the parser of the corrupt file
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the tokenizer cannot be opened ({reason}); copy its files again") from error
    require_fast(tokenizer, str(folder))
    return tokenizer


def check_config(folder: Path) -> None:
    """Refuse a config.json that transformers does not open: the student would inherit its faults.

    Raises:
        UserError: transformers does not open it. Model types that transformers does not know are not checked here.
    """
    path = folder / "config.json"
    if not path.is_file() or read_json(path).get("model_type") not in CONFIG_MAPPING:
        return
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the class depends on the key
        raise UserError(f"{path}: transformers rejects it ({joined(error)}); correct it") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a file with a vocabulary."""
    return any((folder / name).is_file() for name in KNOWN_FILES)


def require_fast(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a slow tokenizer: the stream needs the `tokenizers` library."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: only fast tokenizers are supported; save it as tokenizer.json with transformers")


def encoder(tokenizer: PreTrainedTokenizerBase, document_end: str | None = None) -> Encoder:
    """How documents become tokens: with BOS if the tokenizer puts one before a text, and always with an end token.

    The end is `document_end` or the tokenizer's EOS. A tokenizer without EOS needs data.document_end.
    """
    require_fast(tokenizer, tokenizer.name_or_path or "tokenizer")
    end = tokenizer.eos_token if document_end is None else document_end
    if end is None:
        raise UserError("the tokenizer has no EOS token to end documents with; name one in data.document_end")
    end_id = id_of(tokenizer, str(end), "data.document_end")
    bos: Any = tokenizer.bos_token_id
    start = (bos,) if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else ()
    backend: Any = tokenizer
    check_text(tokenizer, [*start, end_id])
    return Encoder(
        tokenizer_json=backend.backend_tokenizer.to_str(),
        start=start,
        end=end_id,
        split_special=tokenizer.split_special_tokens,
        num_rows=getattr(tokenizer, NUM_ROWS, None),
    )


def id_of(tokenizer: PreTrainedTokenizerBase, token: str, key: str) -> int:
    """The id of a token that the setting `key` names.

    Raises:
        UserError: the tokenizer does not have it.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise UserError(f"{key}={token}: not a token of this tokenizer; name one of its special tokens")
    return found


def sequence_start(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> int | None:
    """The id of the token that begins each sequence of text; None if nothing does."""
    return None if data.sequence_start is None else id_of(tokenizer, data.sequence_start, "data.sequence_start")


def chat_format(name: str, source: SourceConfig, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> ChatFormat:
    """The format of a source of conversations.

    Raises:
        UserError: there is no template, or its file cannot be read.
    """
    if source.template is not None:
        template = tool_template = read_template(Path(source.template), f"data.sources.{name}.template")
    else:
        own = tokenizer.chat_template or {}
        own = {"default": own} if isinstance(own, str) else own
        if "default" not in own:
            raise UserError(
                f"{source.path}: the tokenizer {tokenizer.name_or_path} has no chat template for conversations; set "
                "data.sources.NAME.template to a file"
            )
        template, tool_template = own["default"], own.get("tool_use", own["default"])
    return ChatFormat(
        template=template,
        tool_template=tool_template,
        special_tokens={key: plain(value) for key, value in tokenizer.special_tokens_map.items()},
        loss=source.loss,
        too_long=source.too_long,
        seq_length=seq_length,
    )


def plain(value: Any) -> Any:
    """A special token, or a list of them, as text."""
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def document_start(tokenizer: PreTrainedTokenizerBase, document_end: str | None = None) -> list[int]:
    """Tokens before a document's text in the stream: the end of the previous one, then BOS if the tokenizer uses one."""
    known = encoder(tokenizer, document_end)
    return [known.end, *known.start]


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding of `num_rows` rows.

    Added tokens (such as [PAD] in many fine-tuned models) may lie beyond the rows if no text holds them: the tokenizer
    stores `num_rows`, and its encoder refuses such a text.
    """
    if (needed := vocab_size(tokenizer)) > num_rows:
        beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= num_rows}
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab")()  # noqa: B009 # the annotation is wrong
        if beyond.keys() <= added.keys():
            setattr(tokenizer, NUM_ROWS, num_rows)
            say(
                f"tokenizer {tokenizer.name_or_path}: the model's embedding has {num_rows} rows and none for "
                f"{', '.join(map(repr, sorted(beyond)[:3]))} ({len(beyond)} added tokens); a text that holds one is rejected"
            )
            return
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: ids up to {needed - 1}, but the model's embedding has {num_rows} "
            "rows; use the tokenizer that belongs to the model"
        )


def check_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Refuse a tokenised text with an id beyond the rows that `check_tokenizer` stored."""
    check_ids(ids, getattr(tokenizer, NUM_ROWS, None), tokenizer.convert_ids_to_tokens)


def check_same(student: PreTrainedTokenizerBase, teacher: Path) -> None:
    """Refuse a teacher whose tokenizer gives other ids than the student's. One of them may have more tokens.

    A teacher's folder without a tokenizer counts as using the student's.
    """
    folder = Path(student.name_or_path)
    if not has_tokenizer(teacher) or same_bytes(folder, teacher):
        return
    other = load(teacher)
    names = [{i: token for token, i in one.get_vocab().items()} for one in (student, other)]
    where = f"the student ({folder}) and the teacher ({teacher}) have different tokenizers"
    remedy = "distil with a student that has the teacher's tokenizer"
    for i in sorted(names[0].keys() & names[1].keys()):
        if names[0][i] != names[1][i]:
            raise UserError(f"{where}: id {i} is {names[0][i]!r} in one and {names[1][i]!r} in the other; {remedy}")
    rules = [text_rules(one) for one in (student, other)]
    for key in rules[0].keys() | rules[1].keys():
        if rules[0].get(key) != rules[1].get(key):
            raise UserError(f"{where}: the ids agree, but not the {key}; {remedy}")


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tokenizer.json and tokenizer_config.json."""
    files = [[folder / name for folder in (one, other)] for name in ("tokenizer.json", "tokenizer_config.json")]
    return all(all(path.is_file() for path in pair) and pair[0].read_bytes() == pair[1].read_bytes() for pair in files)


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over all that decides the ids of a text: the vocabulary with its added tokens, and `text_rules`."""
    known = [sorted(tokenizer.get_vocab().items()), text_rules(tokenizer)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def text_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the tokens of a text besides the vocabulary: merges, normalizer, pre-tokenizer."""
    backend: Any = tokenizer
    made = json.loads(backend.backend_tokenizer.to_str())
    rules = {f"model's {key}": value for key, value in made["model"].items() if key != "vocab"}
    return rules | {key: made[key] for key in ("normalizer", "pre_tokenizer")}
