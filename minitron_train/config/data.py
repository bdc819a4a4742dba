"""Section data: the training stream, and the sources of its blend."""

import math
from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import opt, require, require_positive


class SourceKind(StrEnum):
    """Formats of a source; auto goes by file names and content, bin is megatron-core's IndexedDataset (.bin/.idx).

    chat is conversations in JSON Lines, JSON arrays, Parquet or Arrow; the format of the files is recognised as with auto.
    """

    auto = "auto"
    embedded = "embedded"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    csv = "csv"
    arrow = "arrow"
    bin = "bin"
    hub = "hub"
    chat = "chat"


class ChatLoss(StrEnum):
    """The tokens of a conversation that the loss counts."""

    assistant = "assistant"
    last_turn = "last_turn"
    all = "all"


class TooLong(StrEnum):
    """What happens to a conversation of more than train.seq_length tokens."""

    cut = "cut"
    drop = "drop"


HUB_PREFIX = "hf://datasets/"  # Hugging Face's own scheme: a path of kind=chat that begins so is a repository


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of the blend."""

    path: str | None = opt(
        None,
        "file, folder or glob; kind=hub: repository id; kind=chat also takes hf://datasets/ID; kind=embedded: prose or "
        "code; null: you must set it",
        path=True,
    )
    kind: SourceKind = opt(
        SourceKind.auto, "format of the files; auto: by name and content; chat: conversations in any of these formats"
    )
    text_key: str = opt("text", "column that holds the text")
    weight: float = opt(1.0, "share of the training tokens; weights of all parts are normalised to 1")
    late_weight: float | None = opt(None, "weight in the last data.late_fraction of the tokens; default: weight")
    subset: str | None = opt(None, "kind=hub: configuration name of the data set")
    split: str = opt(
        "train", "split to read; for files, train means those that no other split's name claims, all means every file"
    )
    revision: str | None = opt(None, "kind=hub: commit to read; without it the data may change during a run")
    suggestion: str | None = opt(None, "public data set that the error message proposes when path is missing")
    loss: ChatLoss = opt(
        ChatLoss.assistant,
        "kind=chat: tokens that the loss counts; of a prompt and completion, at most the completion's",
    )
    template: str | None = opt(
        None, "kind=chat: file with a chat template (Jinja); default: the tokenizer's own", path=True
    )
    too_long: TooLong = opt(TooLong.cut, "kind=chat: cut or drop conversations of more than train.seq_length tokens")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The training stream; its held-out slice is the validation set."""

    name: str = opt("embedded", "name of the blend; written to provenance.json")
    path: str | None = opt(None, "your own text or tokens (file, folder or glob); replaces data.sources", path=True)
    kind: SourceKind = opt(
        SourceKind.auto, "format of data.path and data.validation_path; auto: by name and content; chat: conversations"
    )
    text_key: str = opt("text", "column that holds the text in data.path and data.validation_path")
    sources: dict[str, SourceConfig] = opt(
        dict, "sources of the blend, by name, each with a weight; empty: the embedded corpus"
    )
    late_fraction: float = opt(0.0, "fraction of train.num_tokens, at the end of training, that uses late_weight")
    document_end: str | None = opt(None, "token that ends each document; default: EOS of the tokenizer")
    sequence_start: str | None = opt(
        None, "token that begins each sequence of text, like <bos>, which Gemma needs; default: none"
    )
    document_attention: bool = opt(False, "mask attention between documents of one sequence")
    validation_path: str | None = opt(
        None, "validation text; default: held-out documents of the training text", path=True
    )
    validation_tokens: int = opt(32768, "held-out tokens that each evaluation reads")
    validation_fraction: float = opt(0.05, "fraction of the documents held out of training for validation")
    num_workers: int = opt(1, "tokenising processes per rank; 0: tokenise in the training process")
    cache_dir: str | None = opt(
        None,
        "folder for seekable copies of compressed, CSV, Arrow and JSON array files; default: ~/.cache/minitron_train",
        path=True,
    )

    @property
    def has_chat(self) -> bool:
        """Whether training or validation reads conversations."""
        own = self.kind is SourceKind.chat and bool(self.path or self.validation_path)
        sources = [] if self.path else self.sources.values()
        return own or any(source.kind is SourceKind.chat for source in sources if source.weight or source.late_weight)

    def validate(self) -> None:
        """Check ranges and weights; paths are checked when the stream is opened."""
        require_positive(self, "data", "validation_tokens")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "must not be negative", "0 is in process")
        for name in ("late_fraction", "validation_fraction"):
            value = getattr(self, name)
            require(0 <= value < 1, f"data.{name}", value, "must be at least 0 and below 1", "give a share, like 0.05")
        held_out = self.validation_fraction > 0 or self.validation_path is not None
        remedy = "give a share, like 0.01, or data.validation_path"
        require(held_out, "data.validation_fraction", self.validation_fraction, "leaves nothing to validate on", remedy)
        for name, source in self.sources.items():
            weights = (source.weight, source.late_weight or 0.0)
            key = f"data.sources.{name}.weight"
            is_share = all(weight >= 0 and math.isfinite(weight) for weight in weights)
            require(is_share, key, weights, "must be a finite number of at least 0", "0 leaves the part out")
            is_used = source.kind is SourceKind.chat or source.template is None
            key = f"data.sources.{name}.template"
            require(is_used, key, source.template, "applies to conversations alone", "set kind=chat, or remove it")
        no_path = self.kind not in (SourceKind.embedded, SourceKind.hub)
        require(no_path, "data.kind", self.kind, "is not a format of files", "name such a source in data.sources")
