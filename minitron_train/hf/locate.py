"""Finds the weight files of a Hugging Face folder that transformers 5 would read.

A folder that two readers could read differently is rejected. transformers prefers a single file and uses the headers of
shards; other readers use the index or read every file.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from minitron_train.hf.config import read_json
from minitron_train.hf.headers import Entry, read_header, refuse_pointer, shown
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import why_no_folder
from minitron_train.runtime.records import open_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_NAME_BYTES = 255  # longest file name on Linux
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
TOKENIZER_FILES = (  # files that transformers' AutoTokenizer, AutoProcessor and GenerationConfig read
    "tokenizer.json",
    "tokenizer.*.json",  # variants for some versions of transformers
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
OTHER_FORMATS = {  # in place of safetensors
    "*.gguf": "holds GGUF files, which are quantised, and no safetensors; take the model's unquantised checkpoint",
    "pytorch_model*.bin": "holds pickled weights (.bin) and no safetensors; convert it with save_pretrained",
    "*.bin": "holds pickled weights (.bin) and no safetensors; convert it with save_pretrained",
    "*.pth": "holds pickled weights (.pth) and no safetensors; take the checkpoint in Hugging Face's format",
    "*.index.json": f"holds an index of other weights and no {INDEX}; take the checkpoint in safetensors format",
    "model-*.safetensors": f"holds shards but no {INDEX}; download the checkpoint again",
    "*.safetensors": f"holds safetensors files, but neither {SINGLE} nor {INDEX}; rename the file, or download it again",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors in the files of one folder, before they are matched with a model."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, list[Entry]]  # by stored name; one entry for each file that holds it
    index: dict[str, str] | None  # stored name -> file; None for a single file
    notes: tuple[str, ...]  # one-line warnings


def carried_files(folder: Path, patterns: tuple[str, ...] = TOKENIZER_FILES) -> list[str]:
    """Names in `folder` that match `patterns`, sorted; never code."""
    subfolders = {pattern.split("/")[0] for pattern in patterns if "/" in pattern}
    names = [path.name for path in folder.iterdir()]
    for subfolder in subfolders.intersection(names):
        if (folder / subfolder).is_dir():
            names += [f"{subfolder}/{path.name}" for path in (folder / subfolder).iterdir()]
    wanted = (name for name in names if any(matches(name, pattern) for pattern in patterns))
    return sorted(name for name in wanted if not name.endswith(".py"))


def matches(name: str, pattern: str) -> bool:
    """fnmatch, except that `*` does not match across folders."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def licence_files(folder: Path) -> list[str]:
    """Names of the licence files."""
    return [name for name in carried_files(folder, LICENCE_FILES) if (folder / name).is_file()]


def check_folder(folder: Path) -> None:
    """Check that a folder's files are regular and in the expected format, before any of them is parsed.

    Raises:
        UserError: the path is no folder, holds an adapter or another format, or a file is a pipe, folder, broken link or
            Git LFS pointer.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {why_no_folder(folder)}")
    try:
        names = ["config.json", INDEX, SINGLE, *carried_files(folder), *licence_files(folder)]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    for name in names:
        check_file(folder / name)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            raise UserError(
                f"{folder / name}: belongs to a LoRA adapter, which some readers apply to the model and others do not; "
                "merge it with merge_and_unload and save_pretrained, or remove it"
            )
    if not has_weights(folder) and not (folder / "config.json").exists():
        refuse_other_formats(folder)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a single weight file or an index; they may be incomplete."""
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def check_file(path: Path) -> None:
    """Reject broken links, files that are not regular or readable, and Git LFS pointers; a missing file is accepted."""
    try:
        with open_file(path) as handle:
            refuse_pointer(path, handle)
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path}: links to a file that does not exist; download it again") from None


def refuse_other_formats(folder: Path) -> None:
    """Raise a UserError that names the folder's format, if it is a known one other than safetensors."""
    names = [path.name for path in folder.iterdir()]
    for pattern, reason in OTHER_FORMATS.items():
        if any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{folder}: {reason}")


def read_weights(folder: Path, config: dict[str, Any]) -> Weights:
    """Read the headers of the weight files that transformers would read.

    Raises:
        UserError: no weights, a shard missing, damaged headers, or further weight files that another reader would read.
    """
    if not has_weights(folder):
        refuse_other_formats(folder)
        raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}; download it again")
    single = (folder / SINGLE).exists()
    index = read_index(folder / INDEX) if (folder / INDEX).exists() else {}
    read = {SINGLE} if single else set(index.values())
    if config.get("transformers_weights") not in (None, SINGLE if single else INDEX):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights={config['transformers_weights']!r} names other weights; "
            f"rename them to {SINGLE} or {INDEX} and remove the key"
        )
    refuse_rivals(folder, read, index)
    files = tuple(folder / name for name in sorted(read))
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(f"{folder}: shard {missing[0]} is missing ({len(missing)} in all); download it again")
    tensors: dict[str, list[Entry]] = {}
    for file in files:
        check_file(file)
        with removed_files(file):
            header = read_header(file)
        for name, entry in header.items():
            tensors.setdefault(name, []).append(entry)
    stale = (f"{folder}: {SINGLE} is read; {INDEX} names shards that are not there, remove it",)
    leftover = single and any(file != SINGLE for file in index.values())
    return Weights(folder, files, tensors, None if single else index, stale if leftover else ())


@contextlib.contextmanager
def removed_files(path: Path) -> Iterator[None]:
    """Turn FileNotFoundError during a block into a UserError: the file was removed while it was read."""
    try:
        yield
    except FileNotFoundError as error:
        missing = error.filename or path
        raise UserError(f"{missing}: was removed or replaced while it was read; run the command again") from None


def read_index(path: Path) -> dict[str, str]:
    """Read the index: stored name -> file name."""
    index = read_json(path)
    try:
        weight_map = msgspec.convert(index.get("weight_map"), dict[str, str])
    except msgspec.ValidationError:
        raise UserError(f"{path}: no weight_map from tensors to files; download it again") from None
    if not isinstance(index.get("metadata"), dict):
        raise UserError(
            f'{path}: transformers opens no index without metadata; add "metadata": {{}}, or download it again'
        )
    for file in weight_map.values():
        if Path(file).name != file or not file.isprintable() or len(file.encode()) > MAX_NAME_BYTES:
            raise UserError(f"{path}: names {shown(file)!r}, which is no file of its folder; download it again")
    return weight_map


def refuse_rivals(folder: Path, read: set[str], index: dict[str, str]) -> None:
    """Reject weight files other than those that are read, because other readers would read them."""
    shards = {path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)}
    rivals = sorted((shards | set(filter(lambda name: (folder / name).exists(), index.values()))) - read)
    if rivals:
        chosen = SINGLE if SINGLE in read else f"the shards of {INDEX}"
        raise UserError(
            f"{folder}: holds {rivals[0]} as well as {chosen} ({len(rivals)} such files); readers differ in which they "
            "read; remove what does not belong to the model"
        )


def weight_bytes(folder: Path) -> int:
    """Total size of the weight files, bytes; 0 if there are none."""
    return sum(file.stat().st_size for file, _ in weight_files(folder)) if has_weights(folder) else 0


def weight_files(folder: Path) -> Iterator[tuple[Path, dict[str, Entry]]]:
    """Yield the weight files in the order of their names, with the tensors that each holds."""
    check_folder(folder)
    weights = read_weights(folder, read_json(folder / "config.json"))
    for file in weights.files:
        yield (
            file,
            {name: entry for name, entries in weights.tensors.items() for entry in entries if entry.file == file},
        )
