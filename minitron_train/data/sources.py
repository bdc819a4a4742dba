"""From the `data` section to opened sources: which files there are, in which format, with which weights."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path

from minitron_train.config import DataConfig, SourceConfig, SourceKind
from minitron_train.data.corpus import PARTS
from minitron_train.data.formats import Embedded, JsonLines, Parquet, TextFiles, TextFormat, combine
from minitron_train.data.hub import HubSource
from minitron_train.data.identity import FileRecord, describe
from minitron_train.data.indexed import IndexedSource
from minitron_train.data.lines import COMPRESSED
from minitron_train.data.units import Split
from minitron_train.errors import UserError

SUFFIXES = {  # of the file names, after .gz or .zst is taken off
    SourceKind.jsonl: (".jsonl", ".ndjson", ".json"),
    SourceKind.parquet: (".parquet", ".pq"),
    SourceKind.bin: (".idx",),
    SourceKind.text: (".txt", ".md", ".rst", ".py"),
}
ABOUT_DATA = ("dataset_info*.json", "*.md", "readme*.txt", "readme*.rst", "license*.txt")  # lie beside data
FORMATS = {SourceKind.jsonl: JsonLines, SourceKind.parquet: Parquet, SourceKind.text: TextFiles}
EMBEDDED_WEIGHTS = {"prose": 0.7, "code": 0.3}  # there is three times as much code as prose; language models need prose


@dataclass(frozen=True)
class Part:
    """One named part of the blend."""

    name: str
    config: SourceConfig
    cache_dir: Path

    @property
    def weights(self) -> tuple[float, float]:
        """Shares in the first and in the last phase, not normalised."""
        late = self.config.late_weight
        return self.config.weight, self.config.weight if late is None else late

    @cached_property
    def paths(self) -> list[Path]:
        """The files that the path stands for, sorted; none for the hub and the embedded corpus."""
        if self.config.kind in (SourceKind.embedded, SourceKind.hub):
            return []
        return matching_files(str(self.config.path), self.config.kind)

    @cached_property
    def kind(self) -> SourceKind:
        """The format, from the file names where it is `auto`."""
        if self.config.kind is not SourceKind.auto:
            return self.config.kind
        kinds = {kind_of(path) or SourceKind.text for path in self.paths}
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.value for kind in kinds))
            raise UserError(
                f"{self.config.path}: files of several formats ({names}); give a narrower glob, like FOLDER/**/*.jsonl, "
                "or data.sources.NAME.kind"
            )
        return kinds.pop()

    def open(self, split: Split) -> "TextFormat | IndexedSource | HubSource":
        """The source, checked by its names only: files are opened, and copied where needed, when blocks are asked for."""
        match self.kind:
            case SourceKind.embedded:
                part = str(self.config.path)
                return Embedded(paths=(Path(f"embedded-{part}"),), cache_dir=self.cache_dir, part=part)
            case SourceKind.hub:
                return HubSource(self.name, self.config)
            case SourceKind.bin:
                prefixes = [path.with_suffix("") for path in self.paths]
                missing = [prefix for prefix in prefixes if not prefix.with_name(prefix.name + ".bin").exists()]
                if missing:
                    raise UserError(f"{missing[0]}.bin: missing beside its .idx; copy both")
                return IndexedSource(prefixes, split)
            case kind:
                make = FORMATS[kind]
                return make(paths=tuple(self.paths), text_key=self.config.text_key, cache_dir=self.cache_dir)


def parts(data: DataConfig) -> list[Part]:
    """The blend's parts with a weight in some phase; every missing path is named in one error."""
    configs = {name: source for name, source in blend(data).items() if source.weight or source.late_weight}
    if not any(source.weight for source in configs.values()):
        raise UserError("data.sources: every weight is 0; give at least one part a weight")
    check_paths(configs, data.name)
    found = [Part(name, source, cache_folder(data)) for name, source in configs.items()]
    if data.late_fraction and not any(part.weights[1] for part in found):
        raise UserError(
            f"data.late_fraction={data.late_fraction}: every late_weight is 0; give at least one part a late_weight"
        )
    return found


def cache_folder(data: DataConfig) -> Path:
    """Where seekable copies go."""
    cache = data.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "minitron_train"
    return Path(cache).expanduser()


def blend(data: DataConfig) -> dict[str, SourceConfig]:
    """`data.path` alone if there is one, else `data.sources`, else the embedded corpus."""
    if data.path:
        return {"own": SourceConfig(path=data.path, text_key=data.text_key)}
    return data.sources or {
        name: SourceConfig(path=name, kind=SourceKind.embedded, weight=weight)
        for name, weight in EMBEDDED_WEIGHTS.items()
    }


def check_paths(configs: dict[str, SourceConfig], blend_name: str) -> None:
    """Refuse missing paths, all in one line with what could stand there."""
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


def kind_of(path: Path) -> SourceKind | None:
    """The format that a file name tells."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def matching_files(pattern: str, kind: SourceKind) -> list[Path]:
    """Files of a file name, a folder or a glob, sorted; none is an error. A .bin/.idx pair counts as its .idx file."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = files_below(path, kind)
    elif has_magic(pattern) and not path.is_file():
        files = [Path(file) for file in glob(str(path), recursive=True) if Path(file).is_file()]  # noqa: PTH207
    else:
        files = [file for file in (path, Path(f"{path}.idx")) if file.is_file()]  # Megatron names a pair by its prefix
    files = sorted({index_of(file) for file in files})
    if not files:
        raise UserError(f"{pattern}: no text file matches; give an existing file, folder or quoted glob")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{pattern}: the corpus is empty (0 bytes in {len(files)} files); give one with text")
    return files


def files_below(folder: Path, kind: SourceKind) -> list[Path]:
    """The files below a folder whose names tell the format; all of them where a format is set and no name tells it.

    Hidden ones are left out, and of a folder with data what is about them (as the README.md of a data set of the hub).
    """
    files = [file for file in folder.rglob("*") if file.is_file() and not is_hidden(file.relative_to(folder))]
    if kind is not SourceKind.auto:
        return [file for file in files if kind_of(file) is kind] or files
    data = [file for file in files if kind_of(file) and not is_about_data(file)]
    if any(kind_of(file) is not SourceKind.text for file in data):
        return data
    return [file for file in files if kind_of(file) is SourceKind.text]


def is_about_data(path: Path) -> bool:
    """Whether a file tells about the data beside it, by its name in any case."""
    return any(fnmatch(path.name.lower(), pattern) for pattern in ABOUT_DATA)


def is_hidden(path: Path) -> bool:
    """Whether a file or a folder above it has a name that begins with a dot."""
    return any(name.startswith(".") for name in path.parts)


def index_of(path: Path) -> Path:
    """The .idx beside a .bin file; any other file is itself."""
    index = path.with_suffix(".idx")
    return index if path.suffix == ".bin" and index.is_file() else path


def files(data: DataConfig) -> list[Path]:
    """Every file of the blend, none of them opened.

    Raises:
        UserError: a part without a path, a path without files, or with files of several formats.
    """
    return [path for part in parts(data) if part.kind for path in part.paths]


def copied_bytes(data: DataConfig) -> int:
    """About what the seekable copies of compressed files take in the cache folder; 0 where not all paths are known yet."""
    try:
        return sum(path.stat().st_size for path in files(data) if path.suffix in COMPRESSED)
    except UserError:
        return 0


def train_split(data: DataConfig) -> Split:
    """The documents that training may see: all but the held-out ones, or all when validation has its own files."""
    return Split(held_out=False, fraction=0 if data.validation_path else data.validation_fraction)


def identity(data: DataConfig) -> dict[str, str]:
    """What a stream of `data` gives, by label, as inputs of a stage: fingerprints, weights, what is held out, what ends a
    document. Tokenizer, seed and lengths are inputs and settings of their own.
    """
    found, split, blended = {}, train_split(data), parts(data)
    for part in blended:
        found[f"data {part.name}"] = part.open(split).fingerprint()
        weight, late_weight = part.weights
        if len(blended) > 1:
            found[f"data {part.name} weight"] = f"{weight:g}"
        if data.late_fraction:
            found[f"data {part.name} late_weight"] = f"{late_weight:g}"
    found["data validation_fraction"] = f"{split.fraction:g}"
    return found | ({"data document_end": data.document_end} if data.document_end else {})


def file_records(data: DataConfig) -> list[FileRecord]:
    """Every file of the blend as it is now; none for the embedded corpus and repositories of the hub."""
    opened = [(part, part.open(train_split(data))) for part in parts(data)]
    found = [source.files if isinstance(source, IndexedSource | HubSource) else part.paths for part, source in opened]
    return [record for paths in found for record in describe(paths)]


def fingerprint(sources: Sequence[Part], opened: Sequence["TextFormat | IndexedSource | HubSource"]) -> str:
    """sha256 over names, weights and contents of a blend."""
    rows = [f"{part.name} {part.weights} {source.fingerprint()}" for part, source in zip(sources, opened, strict=True)]
    return combine(rows)
