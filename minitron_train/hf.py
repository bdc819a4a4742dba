"""Hugging Face folders: config.json, (sharded) safetensors, tokenizer files. The only place that knows their layout."""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_train.arch import ARCHITECTURES, Shape, architecture
from minitron_train.errors import UserError
from minitron_train.files import disk_errors

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 4 * 2**30
SAMPLE_BYTES, NUM_SAMPLES = 4096, 8  # of a tensor go into its folder's fingerprint
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS: dict[str, Any] = {field.name: field.type for field in fields(Shape)}
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
LEGACY_KEYS = {  # older names of config.json keys, newest first
    "partial_rotary_factor": ("rope_percent", "rotary_percent", "rope_percentage"),
    "head_dim": ("kv_channels",),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a Hugging Face checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; copy the file again")
    return value


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """A key of config.json, in today's place (rope_parameters), else at the top level, or under an older name."""
    rope = config.get("rope_parameters")
    places = (rope, config) if isinstance(rope, Mapping) else (config,)
    for name in (key, *LEGACY_KEYS.get(key, ())):
        for place in places:
            if place.get(name) is not None:
                return place[name]
    return None


def shape_from_config(config: Mapping[str, Any], where: str) -> Shape:
    """Read a Shape off config.json.

    Raises:
        UserError: unsupported architecture or feature, or a needed key that is missing.
    """
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{where}: model_type {name!r} is not supported; supported architectures: {supported}")
    table = architecture(str(name))
    values: dict[str, Any] = dict.fromkeys(table.config_keys)
    for field, key in table.config_keys.items():
        if (value := lookup(config, key)) is not None:
            values[field] = number(value, key, where, KINDS[field])
    values["num_query_groups"] = values["num_query_groups"] or values["num_attention_heads"]
    if values["kv_channels"] is None and values["hidden_size"] and values["num_attention_heads"]:
        values["kv_channels"] = values["hidden_size"] // values["num_attention_heads"]
    for field, key in table.config_keys.items():
        if values[field] is None:
            raise UserError(f"{where}: the key {key!r} is missing; add it as the model's authors give it")
    for key, wanted in table.config_facts.items():
        if (given := config.get(key, table.config_defaults.get(key))) not in (wanted, None):
            silent = "" if key in config else ", which transformers assumes where the key is missing"
            raise UserError(
                f"{where}: {key}={given!r}{silent}: only {wanted!r} is supported for {name}; use another teacher"
            )
    percent, base = lookup(config, "partial_rotary_factor"), lookup(config, "rope_theta")
    shape = Shape(
        architecture=table.name,
        rotary_percent=table.rotary_percent if percent is None else number(percent, "partial_rotary_factor", where),
        rotary_base=10000.0 if base is None else number(base, "rope_theta", where),
        rope_scaling_factor=rope_scaling_factor(config, where),
        **values,
    )
    shape.check(where)
    return shape


def number(value: Any, key: str, where: str, kind: type = float) -> Any:
    """A value of config.json as the number that it must be.

    Raises:
        UserError: it is none, or not a whole one where `kind` is int.
    """
    is_number = isinstance(value, int | float) and (kind is bool or not isinstance(value, bool))
    if not is_number or not math.isfinite(value) or (kind is int and value != int(value)):
        whole = "whole " if kind is int else ""
        raise UserError(f"{where}: {key}={value!r} is not a {whole}number; set it as the model's authors give it")
    return kind(value)


def rope_scaling_factor(config: Mapping[str, Any], where: str) -> float | None:
    """Llama 3.1's scaling factor; None without scaling. Other kinds of scaling are refused."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        raise UserError(f"{where}: {key}={rope!r} is not an object; set it as the model's authors give it")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, llama3")
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for key, wanted in fixed.items():
        if rope.get(key, wanted) != wanted:
            raise UserError(f"{where}: llama3 rope scaling with {key}={rope[key]}: only {wanted} is supported")
    return number(rope.get("factor"), "the factor of rope_scaling", where)


class Checkpoint:
    """The tensors of a Hugging Face folder, memory-mapped, each read when it is asked for.

    Every shard's header and length are checked on opening, so that a truncated download is refused before any work.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.shape = shape_from_config(self.config, str(folder / "config.json"))
        self.table = architecture(self.shape.architecture)
        self.files = self._locate()
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in sorted(set(self.files.values())):
            for name, entry in read_header(file).items():
                self.sizes[name], self.dtypes[name] = tuple(entry["shape"]), entry["dtype"]
        self._check_tensors()
        self._open: dict[Path, Any] = {}

    def _locate(self) -> dict[str, Path]:
        """Tensor name -> file."""
        if (self.folder / INDEX).exists():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{self.folder / INDEX}: no weight_map from tensors to files; download it again")
            files = {name: self.folder / file for name, file in weight_map.items()}
            missing = sorted({file.name for file in files.values() if not file.exists()})
            if missing:
                raise UserError(
                    f"{self.folder}: shard {missing[0]} is missing ({len(missing)} in all); download it again"
                )
            return files
        if not (self.folder / SINGLE).exists():
            hint = "convert it with save_pretrained" if any(self.folder.glob("*.bin")) else "download it again"
            raise UserError(f"{self.folder}: holds neither {SINGLE} nor {INDEX}; {hint}")
        return dict.fromkeys(read_header(self.folder / SINGLE), self.folder / SINGLE)

    def _check_tensors(self) -> None:
        for name, size in self.table.tensors(self.shape).items():
            if name not in self.files or name not in self.sizes:
                raise UserError(f"{self.folder}: tensor {name} is missing; download the checkpoint again")
            if self.sizes[name] != size:
                raise UserError(
                    f"{self.folder}: tensor {name} has size {list(self.sizes[name])}, config.json says {list(size)}; "
                    "the folder mixes two models"
                )
            if self.dtypes[name] not in STORED_DTYPES:
                raise UserError(
                    f"{self.folder}: tensor {name} has type {self.dtypes[name]}; supported: {', '.join(STORED_DTYPES)}; "
                    "take the model's unquantised checkpoint"
                )

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its rows [start, stop) along `dim` (0 or 1); only those bytes are read where rows lie together."""
        handle = self._handle(self.files[name])
        if dim is None:
            return handle.get_tensor(name)
        cut = slice(start, stop)
        return handle.get_slice(name)[cut] if dim == 0 else handle.get_slice(name)[:, cut]

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt")
        return self._open[file]


def read_header(file: Path, remedy: str = "download it again") -> dict[str, dict[str, Any]]:
    """The header of one safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises:
        UserError: the file is cut off or not safetensors at all.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise UserError(f"{file}: not a safetensors file, or cut off; {remedy}")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            _ = [(tuple(entry["shape"]), entry["dtype"]) for entry in header.values()]  # readers take them for granted
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: its header is corrupt; {remedy}") from None
    if size != 8 + length + end:
        raise UserError(f"{file}: {size:,} bytes, its header promises {8 + length + end:,}; {remedy}")
    return header


def student_config(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The teacher's config.json with the sizes of `shape`; every other key stays."""
    table = architecture(shape.architecture)
    changed = dict(config) | {key: getattr(shape, field) for field, key in table.config_keys.items()}
    changed["architectures"] = [table.hf_class]
    changed.pop("layer_types", None)  # one entry per layer; without sliding windows its default is right
    if dtype is not None:
        changed.pop("torch_dtype", None)
        changed["dtype"] = str(dtype).removeprefix("torch.")
    return changed


def fingerprint(folder: Path) -> str:
    """sha256 over config.json, the tokenizer's files and, for each tensor, its name, type, size and eight samples of 4 KiB.

    The samples lie at equal distances, the first and the last bytes among them: a training changes them, and so does new
    rows for added tokens. A 31 GB folder takes a second, where hashing all bytes would take minutes.
    """
    digest = hashlib.sha256()
    for name in ("config.json", *TOKENIZER_FILES):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        header = read_header(file)
        with file.open("rb") as handle:
            start = 8 + struct.unpack("<Q", handle.read(8))[0]
            for name, entry in sorted(header.items()):
                begin, end = entry["data_offsets"]
                digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode())
                last = max(end - begin - SAMPLE_BYTES, 0)
                for offset in sorted({last * i // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)}):
                    handle.seek(start + begin + offset)
                    digest.update(handle.read(min(SAMPLE_BYTES, end - begin)))
    return digest.hexdigest()


def in_shards(
    tensors: Iterable[tuple[str, T]], num_bytes: Callable[[T], int], max_bytes: int
) -> Iterator[dict[str, T]]:
    """What each file of a folder holds: tensors in order, at most `max_bytes` together (a larger one is alone)."""
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
    """Of the files of a folder, as transformers names them."""
    return [SINGLE] if count == 1 else [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]


def write_index(folder: Path, shards: Sequence[Iterable[str]], total_bytes: int) -> None:
    """Say which file holds which tensor, where there are several: `shards` are the names of each one's tensors."""
    if len(shards) > 1:
        files = zip(shard_names(len(shards)), shards, strict=True)
        weight_map = {name: file for file, names in files for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what a tokenizer is made of, and generation_config.json, when they are there."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def write_folder(
    target: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """A whole Hugging Face folder; `target` exists and is empty (files.atomic_folder gives one). Memory: one shard."""
    shards: list[list[str]] = []
    total_bytes = 0
    for shard in in_shards(tensors, lambda tensor: tensor.nbytes, max_shard_bytes):
        with disk_errors(target):
            save_file(shard, target / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # the next one takes its room
    for k, name in enumerate(shard_names(len(shards))):
        (target / f"shard-{k}").rename(target / name)
    write_index(target, shards, total_bytes)
    (target / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if tokenizer is not None:
        copy_tokenizer(tokenizer, target)
