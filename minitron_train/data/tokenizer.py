"""Tokenizers: opened, checked against the model, and trained on the spot for recipes that download nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minitron_train.data.units import Encoder
from minitron_train.errors import UserError
from minitron_train.files import atomic_folder

BOS, EOS = "<s>", "</s>"


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
    """The folder's tokenizer; it must be a fast one (tokenizer.json), nothing is fetched."""
    folder = Path(folder)
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    if not any((folder / name).is_file() for name in known):
        raise UserError(f"{folder}: no tokenizer ({known[0]}) there; copy the model's, or give calibration.tokens")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a corrupt file raises whatever its parser raises
        raise UserError(f"{folder}: the tokenizer cannot be opened ({error}); copy its files again") from error
    require_fast(tokenizer, str(folder))
    return tokenizer


def require_fast(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """The stream tokenises through the `tokenizers` library only."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: only fast tokenizers are supported; save it as tokenizer.json with transformers")


def encoder(tokenizer: PreTrainedTokenizerBase, document_end: str | None = None) -> Encoder:
    """How documents become tokens: BOS first where the tokenizer puts one before a text itself, and always an end.

    The end is `document_end` or the tokenizer's EOS; a tokenizer without EOS needs data.document_end.
    """
    require_fast(tokenizer, tokenizer.name_or_path or "tokenizer")
    end = tokenizer.eos_token if document_end is None else document_end
    if end is None:
        raise UserError("the tokenizer has no EOS token to end documents with; name one in data.document_end")
    end_id = tokenizer.get_vocab().get(str(end))
    if end_id is None:
        raise UserError(f"data.document_end={end}: not a token of this tokenizer; name one of its special tokens")
    bos: Any = tokenizer.bos_token_id
    start = (bos,) if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else ()
    backend: Any = tokenizer
    return Encoder(tokenizer_json=backend.backend_tokenizer.to_str(), start=start, end=end_id)


def document_start(tokenizer: PreTrainedTokenizerBase, document_end: str | None = None) -> list[int]:
    """What stands before a document's text in the stream: the end of the one before, and BOS where the tokenizer has one."""
    known = encoder(tokenizer, document_end)
    return [known.end, *known.start]


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Refuse a tokenizer with ids that the model's embedding of `num_rows` rows does not have."""
    if (needed := vocab_size(tokenizer)) > num_rows:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: ids up to {needed - 1}, but the model's embedding has {num_rows} "
            "rows; use the tokenizer that belongs to the model"
        )
