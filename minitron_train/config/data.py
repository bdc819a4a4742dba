"""Section data: the training stream, and the parts of its blend."""

import math
from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import opt, require, require_positive


class SourceKind(StrEnum):
    """Formats of a source; auto goes by file names and content, bin is megatron-core's IndexedDataset (.bin/.idx)."""

    auto = "auto"
    embedded = "embedded"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    csv = "csv"
    arrow = "arrow"
    bin = "bin"
    hub = "hub"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One part of the blend."""

    path: str | None = opt(
        None, "file, folder or glob; hub: a repository id; embedded: prose or code; null: missing", path=True
    )
    kind: SourceKind = opt(SourceKind.auto, "format")
    text_key: str = opt("text", "column that holds the text")
    weight: float = opt(1.0, "share of the tokens, normalised over the parts")
    late_weight: float | None = opt(None, "share in the last phase (data.late_fraction); default: weight")
    subset: str | None = opt(None, "kind=hub: configuration of the data set")
    split: str = opt(
        "train", "split of the data set; files: by their names, train takes what no other split has, all takes all"
    )
    revision: str | None = opt(None, "kind=hub: pinned commit; without one the data may change under a run")
    suggestion: str | None = opt(None, "a public data set that could stand here")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The training stream; its held-out slice is the validation set."""

    name: str = opt("embedded", "of the blend; goes into provenance")
    path: str | None = opt(None, "your own text or tokens (file, folder or glob); replaces sources", path=True)
    text_key: str = opt("text", "column that holds the text in data.path and data.validation_path")
    sources: dict[str, SourceConfig] = opt(dict, "weighted parts of the blend by name; empty: the embedded corpus")
    late_fraction: float = opt(0.0, "last share of train.num_tokens, which uses late_weight")
    document_end: str | None = opt(None, "token that ends each document; default: the tokenizer's EOS")
    document_attention: bool = opt(False, "tokens attend inside their own document only")
    validation_path: str | None = opt(
        None, "held-out text, never trained on; default: a slice of the stream", path=True
    )
    validation_tokens: int = opt(32768, "tokens of the held-out slice that are evaluated")
    validation_fraction: float = opt(0.05, "share of the documents held out of training")
    num_workers: int = opt(1, "tokenising processes per rank; 0 tokenises in the training process")
    cache_dir: str | None = opt(
        None, "seekable copies of compressed files; default: ~/.cache/minitron_train", path=True
    )

    def validate(self) -> None:
        """Ranges, kinds and weights; paths are checked when the stream is opened."""
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
