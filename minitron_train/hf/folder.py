"""Writes a Hugging Face folder, copies its tokenizer, and computes its fingerprint."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from minitron_train.hf.config import portable_tokenizer_config, read_json
from minitron_train.hf.locate import INDEX, SINGLE, carried_files, licence_files, removed_files, weight_files
from minitron_train.runtime.files import disk_errors
from minitron_train.runtime.records import open_file, read_bytes

T = TypeVar("T")
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_SHARD_BYTES = 4 * 2**30
SAMPLE_BYTES, NUM_SAMPLES = 4096, 8  # samples of each tensor that the fingerprint reads


def fingerprint(folder: Path) -> str:
    """sha256 over config.json, the tokenizer's and processor's files, and each tensor's name, type, size and samples.

    Eight samples of 4 KiB are read at equal distances, including the first and last bytes. Training changes them, and so do
    new rows for added tokens. A 31 GB folder takes a second; hashing all bytes would take minutes. The weights are those
    that HFFolder reads. Licence texts are ignored.

    Raises:
        UserError: see HFFolder.
    """
    with removed_files(folder):
        return digest_of(folder)


def digest_of(folder: Path) -> str:
    """The digest that `fingerprint` returns; a file that disappears raises FileNotFoundError."""
    digest = hashlib.sha256()
    weights = list(weight_files(folder))
    for name in ("config.json", *carried_files(folder)):
        content = read_bytes(folder / name)
        digest.update(f"{name} {len(content)} ".encode(errors="surrogateescape"))
        digest.update(content)
    for file, tensors in weights:
        for name, entry in sorted(tensors.items()):
            digest.update(f"{name} {entry.dtype} {list(entry.size)}".encode(errors="surrogatepass"))
        with open_file(file) as handle:
            for _, entry in sorted(tensors.items()):
                last = max(entry.num_bytes - SAMPLE_BYTES, 0)
                for offset in sorted({last * i // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)}):
                    handle.seek(entry.start + offset)
                    digest.update(handle.read(min(SAMPLE_BYTES, entry.num_bytes)))
    return digest.hexdigest()


def in_shards(
    tensors: Iterable[tuple[str, T]], num_bytes: Callable[[T], int], max_bytes: int
) -> Iterator[dict[str, T]]:
    """Group tensors into files, in order, of at most `max_bytes`; a larger tensor gets a file of its own."""
    shard: dict[str, T] = {}
    held = 0
    for name, tensor in tensors:
        size = num_bytes(tensor)
        if shard and held + size > max_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += size
    yield shard


def shard_names(count: int) -> list[str]:
    """Names of `count` weight files, as transformers names them."""
    return [SINGLE] if count == 1 else [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]


def write_index(folder: Path, shards: Sequence[Iterable[str]], total_bytes: int) -> None:
    """Write the index of a folder with several weight files; `shards` are the names of each file's tensors."""
    if len(shards) > 1:
        files = zip(shard_names(len(shards)), shards, strict=True)
        weight_map = {name: file for file, names in files for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of tokenizer, processor and generation, and the licence, if they exist; never code.

    tokenizer_config.json is rewritten so that transformers 4 reads it too.
    """
    for name in (*carried_files(source), *licence_files(source)):
        (target / name).parent.mkdir(exist_ok=True)
        if name == TOKENIZER_CONFIG:
            portable = portable_tokenizer_config(read_json(source / name))
            (target / name).write_text(json.dumps(portable, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            with removed_files(source / name):
                shutil.copyfile(source / name, target / name)


def write_folder(
    target: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder into `target`, which exists and is empty (see files.atomic_folder). Memory: one shard."""
    shards: list[list[str]] = []
    total_bytes = 0
    for shard in in_shards(tensors, lambda tensor: tensor.nbytes, max_shard_bytes):
        with disk_errors(target):
            save_file(shard, target / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # free it before the next one is built
    for k, name in enumerate(shard_names(len(shards))):
        (target / f"shard-{k}").rename(target / name)
    write_index(target, shards, total_bytes)
    (target / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, target)
