"""Turn the `data` section into opened sources: their files, formats and weights."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from minitron_train.config import ChatLoss, DataConfig, SourceConfig, SourceKind
from minitron_train.config.data import HUB_PREFIX
from minitron_train.data.chat import read_template
from minitron_train.data.columns import ChatColumns, Columns, TextColumn
from minitron_train.data.corpus import PARTS
from minitron_train.data.discover import FileId, file_id, root_of
from minitron_train.data.formats import (
    Arrow,
    Csv,
    Embedded,
    FileFormat,
    JsonLines,
    Parquet,
    TextFiles,
    TextFormat,
    combine,
)
from minitron_train.data.hub import HubSource
from minitron_train.data.identity import FileRecord, records_of
from minitron_train.data.indexed import IndexedSource
from minitron_train.data.inventory import Inventory, held_out_split, take
from minitron_train.data.packed import suffixes
from minitron_train.data.units import Split
from minitron_train.runtime.errors import UserError

FORMATS = {
    SourceKind.jsonl: JsonLines,
    SourceKind.parquet: Parquet,
    SourceKind.csv: Csv,
    SourceKind.arrow: Arrow,
    SourceKind.text: TextFiles,
}
CHAT_FORMATS = {SourceKind.jsonl, SourceKind.parquet, SourceKind.arrow}
LOSS_ON = {
    ChatLoss.assistant: "assistant turns",
    ChatLoss.last_turn: "the last assistant turn",
    ChatLoss.all: "all tokens",
}
CHAT_SETTINGS = ("loss", "template", "too_long")
COPIED = (SourceKind.csv, SourceKind.arrow)  # always copied into blocks, compressed or not
EMBEDDED_WEIGHTS = {
    "prose": 0.7,
    "code": 0.3,
}  # the corpus has three times as much code as prose; language models need prose


@dataclass(frozen=True)
class Part:
    """One named part of the blend."""

    name: str
    config: SourceConfig
    cache_dir: Path
    held_out: frozenset[FileId] = frozenset()  # files of data.validation_path

    @property
    def weights(self) -> tuple[float, float]:
        """Shares in the first and in the last phase, not normalised."""
        late = self.config.late_weight
        return self.config.weight, self.config.weight if late is None else late

    @cached_property
    def inventory(self) -> Inventory | None:
        """The files of the path; None for the hub and the embedded corpus."""
        if self.is_hub or self.config.kind is SourceKind.embedded:
            return None
        kind = SourceKind.auto if self.is_chat else self.config.kind
        return take(str(self.config.path), kind, split=self.config.split, held_out=self.held_out)

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return self.config.kind is SourceKind.chat

    @property
    def is_hub(self) -> bool:
        """Whether the path is a repository of the hub."""
        on_hub = self.is_chat and str(self.config.path).startswith(HUB_PREFIX)
        return on_hub or self.config.kind is SourceKind.hub

    @property
    def columns(self) -> Columns:
        """What of a row is its document."""
        return ChatColumns() if self.is_chat else TextColumn(self.config.text_key)

    @property
    def paths(self) -> list[Path]:
        """The files of the path, sorted; empty for the hub and the embedded corpus."""
        return self.inventory.files if self.inventory else []

    @cached_property
    def kind(self) -> SourceKind:
        """The configured format; if that is `auto` or `chat`, the format of the files."""
        if not self.inventory:
            return SourceKind.hub if self.is_hub else self.config.kind
        kinds = set(self.inventory.kinds.values())
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.value for kind in kinds))
            raise UserError(
                f"{self.config.path}: files of several formats ({names}); give a narrower glob, like FOLDER/**/*.jsonl, "
                "or data.sources.NAME.kind"
            )
        if self.is_chat and not kinds <= CHAT_FORMATS:
            raise UserError(
                f"{self.config.path}: {kinds.pop().value} holds no conversations (kind=chat); give JSON Lines, a JSON array, "
                "Parquet or Arrow"
            )
        return kinds.pop()

    def describe(self, label: str) -> str | None:
        """One line for the user: what is read and what is left out; None for the embedded corpus."""
        chat = f"; conversations, loss on {LOSS_ON[self.config.loss]}" if self.is_chat else ""
        if self.is_hub:
            names = [
                f"{key} {value}" for key in ("subset", "split", "revision") if (value := getattr(self.config, key))
            ]
            return f"{label}: {self.config.path} of the hub, {', '.join(names)}{chat}"
        return f"{label}: {self.config.path}: {self.inventory.summary()}{chat}" if self.inventory else None

    def open(self, split: Split) -> "TextFormat | IndexedSource | HubSource":
        """The source, with only the file names checked. Files are opened, and copied if needed, when blocks are read."""
        match self.kind:
            case SourceKind.embedded:
                part = str(self.config.path)
                return Embedded(paths=(Path(f"embedded-{part}"),), cache_dir=self.cache_dir, part=part)
            case SourceKind.hub:
                return HubSource(self.name, self.config, self.columns)
            case SourceKind.bin:
                prefixes = [path.with_suffix("") for path in self.paths]
                missing = [prefix for prefix in prefixes if not prefix.with_name(prefix.name + ".bin").exists()]
                if missing:
                    raise UserError(f"{missing[0]}.bin: missing next to its .idx; copy both")
                return IndexedSource(prefixes, split)
            case kind:
                make = FORMATS[kind]
                return make(paths=tuple(self.paths), columns=self.columns, cache_dir=self.cache_dir)


def parts(data: DataConfig) -> list[Part]:
    """The blend's parts that have a weight in some phase. One error names all missing paths."""
    configs = {name: source for name, source in blend(data).items() if source.weight or source.late_weight}
    if not any(source.weight for source in configs.values()):
        raise UserError("data.sources: every weight is 0; give at least one part a weight")
    check_paths(configs, data.name)
    held_out = held_out_files(data)
    found = [Part(name, source, cache_folder(data), held_out) for name, source in configs.items()]
    if data.late_fraction and not any(part.weights[1] for part in found):
        raise UserError(
            f"data.late_fraction={data.late_fraction}: every late_weight is 0; give at least one part a late_weight"
        )
    return found


def cache_folder(data: DataConfig) -> Path:
    """The folder of seekable copies."""
    cache = data.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "minitron_train"
    return Path(cache).expanduser()


def blend(data: DataConfig) -> dict[str, SourceConfig]:
    """`data.path` alone if it is set, otherwise `data.sources`, otherwise the embedded corpus."""
    if data.path:
        return {"own": SourceConfig(path=data.path, kind=data.kind, text_key=data.text_key)}
    return data.sources or {
        name: SourceConfig(path=name, kind=SourceKind.embedded, weight=weight)
        for name, weight in EMBEDDED_WEIGHTS.items()
    }


def check_paths(configs: dict[str, SourceConfig], blend_name: str) -> None:
    """Refuse missing paths. One line names all of them, with suggestions."""
    missing = {name: source for name, source in configs.items() if source.path in (None, "", "???")}
    if missing:
        hints = [f"{name} ({source.suggestion})" if source.suggestion else name for name, source in missing.items()]
        keys = " ".join(f"data.sources.{name}.path=…" for name in missing)
        raise UserError(
            f"data={blend_name}: these parts have no path: {'; '.join(hints)}; give {keys}, or a weight of 0, "
            f"or train on data=embedded or your own data.path=FILES"
        )
    for name, source in configs.items():
        if source.kind is SourceKind.embedded and source.path not in PARTS:
            raise UserError(
                f"data.sources.{name}.path={source.path}: kind=embedded has {' and '.join(PARTS)}; choose one"
            )


def check_outside(data: DataConfig, folder: Path) -> None:
    """Refuse an output folder inside of the data: the run would read what it writes, and could not resume.

    Raises:
        UserError: the folder lies in a data folder, or below one that a glob with ** searches.
    """
    paths = [source.path for source in blend(data).values() if source.kind is not SourceKind.embedded]
    for path in filter(None, [*paths, data.validation_path]):
        root = root_of(path)
        inner = folder.resolve().relative_to(root) if root and folder.resolve().is_relative_to(root) else None
        if inner is not None and not any(name.startswith(".") for name in inner.parts):
            raise UserError(
                f"output_dir={folder}: lies inside of {path}, which is read as data; choose an output_dir outside, "
                "or give a narrower data path"
            )


def matching_files(pattern: str, kind: SourceKind) -> list[Path]:
    """Files of a file name, folder or glob, sorted; a UserError if there are none. A .bin/.idx pair counts as its .idx."""
    return take(pattern, kind).files


def validation_source(data: DataConfig) -> SourceConfig:
    """data.validation_path as a source: the validation split of a downloaded data set, else its test split, else all files.

    Conversations are read with the settings of the first source of conversations in the blend.

    Raises:
        UserError: the path has no files.
    """
    path = str(data.validation_path)
    found = SourceConfig(path=path, kind=data.kind, text_key=data.text_key, split=held_out_split(path))
    chats = [source for source in blend(data).values() if source.kind is SourceKind.chat]
    if found.kind is not SourceKind.chat or not chats:
        return found
    return replace(found, **{name: getattr(chats[0], name) for name in CHAT_SETTINGS})


def held_out_files(data: DataConfig) -> frozenset[FileId]:
    """The files of data.validation_path, which training must not read; empty if they are missing."""
    if not data.validation_path:
        return frozenset()
    try:
        source = validation_source(data)
        return frozenset(file_id(path) for path in take(str(source.path), split=source.split).files)
    except UserError:  # validation itself reports it
        return frozenset()


def describe(data: DataConfig, key: str | None = None) -> list[str]:
    """One line per part of a blend: its files.

    Args:
        key: the setting that names the only path, if it is not data.path.
    """
    key = key or ("data.path" if data.path else None)
    return [line for part in parts(data) if (line := part.describe(key or f"data {part.name}"))]


def files(data: DataConfig) -> list[Path]:
    """Every file of the blend; they are opened only where their names do not tell the format.

    Raises:
        UserError: a part without a path, a path without files, or with files of several formats.
    """
    return [path for part in parts(data) if part.kind for path in part.paths]


def copy_files(data: DataConfig) -> None:
    """Write the seekable copies that reading this blend needs, unless they are there.

    Raises:
        UserError: a file cannot be read, or the cache folder cannot be written.
    """
    for part in parts(data):
        source = part.open(train_split(data))
        if isinstance(source, FileFormat):
            _ = source.files


def copied_bytes(data: DataConfig) -> int:
    """Approximate size of the seekable copies in the cache folder; 0 if not all paths are known yet."""
    try:
        return sum(
            path.stat().st_size
            for part in parts(data)
            for path in part.paths
            if suffixes(path)[1] or part.kind in COPIED
        )
    except (UserError, OSError):
        return 0


def train_split(data: DataConfig) -> Split:
    """The documents that training may see: all but the held-out ones, or all when validation has its own files."""
    return Split(held_out=False, fraction=0 if data.validation_path else data.validation_fraction)


def identity(data: DataConfig) -> dict[str, str]:
    """What decides a stream of `data`, by label, as inputs of a stage: fingerprints, weights, the held-out fraction, the
    end of documents and the start of sequences. Tokenizer, seed and lengths are inputs and settings of their own.
    """
    found, split, blended = {}, train_split(data), parts(data)
    for part in blended:
        found[f"data {part.name}"] = part.open(split).fingerprint()
        weight, late_weight = part.weights
        if part.is_chat:
            found |= {f"data {part.name} {key}": value for key, value in chat_settings(part).items()}
        if len(blended) > 1:
            found[f"data {part.name} weight"] = f"{weight:g}"
        if data.late_fraction:
            found[f"data {part.name} late_weight"] = f"{late_weight:g}"
    found["data validation_fraction"] = f"{split.fraction:g}"
    tokens = {"document_end": data.document_end, "sequence_start": data.sequence_start}
    return found | {f"data {key}": token for key, token in tokens.items() if token}


def chat_settings(part: Part) -> dict[str, str]:
    """What decides the tokens of conversations besides the files and the tokenizer, by the name of its setting."""
    config = part.config
    found = {"loss": config.loss.value, "too_long": config.too_long.value}
    if config.template is None:
        return found
    text = read_template(Path(config.template), f"data.sources.{part.name}.template")
    return found | {"template": hashlib.sha256(text.encode()).hexdigest()}


def file_records(data: DataConfig) -> list[FileRecord]:
    """Records of all files of the blend and of data.validation_path, as they are now. The embedded corpus and the hub's
    repositories have none.
    """
    found = parts(data)
    if data.validation_path:
        found += [Part("validation", validation_source(data), cache_folder(data))]
    opened = [part.open(train_split(data)) for part in found]
    return [record for source in opened for record in records_of(files_to_watch(source))]


def files_to_watch(source: "TextFormat | IndexedSource | HubSource") -> Sequence[Path]:
    """The files of a source that may change during a run; none of the embedded corpus and of the hub's repositories."""
    if isinstance(source, IndexedSource | HubSource):
        return source.files
    return source.paths if isinstance(source, FileFormat) and not isinstance(source, Embedded) else ()


def fingerprint(sources: Sequence[Part], opened: Sequence["TextFormat | IndexedSource | HubSource"]) -> str:
    """sha256 over names, weights and contents of a blend."""
    rows = [f"{part.name} {part.weights} {source.fingerprint()}" for part, source in zip(sources, opened, strict=True)]
    return combine(rows)
