"""A training checkpoint -> a Hugging Face folder: the student alone, one tensor after the other, on one process.

Reads the files of torch.distributed.checkpoint directly, so that neither process groups nor a model are needed, whatever
the layout that wrote them. megatron-core saves the layers of one kind as one tensor [layers, …] in pieces
of one layer and one rank.
"""

import io
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from minitron_train.arch import Row, architecture
from minitron_train.arch.build import layer_spec
from minitron_train.arch.convert import export_tensors
from minitron_train.console import say
from minitron_train.errors import UserError
from minitron_train.files import sha256_file
from minitron_train.hf import DTYPES, cast, read_json, shape_from_config, student_config, write_folder
from minitron_train.train import checkpoint_files as files

MODEL = "model"  # beside the checkpoints: config.json and tokenizer of the student


class SavedTensors:
    """The tensors of one checkpoint, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = FileSystemReader(path).read_metadata()
        self.tensors, self.places = metadata.state_dict_metadata, metadata.storage_data or {}

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one layer's part of a tensor that is stacked over the layers."""
        entry = self.tensors[name]
        assert isinstance(entry, TensorStorageMetadata), name
        skip = 0 if layer is None else 1
        whole = torch.empty(entry.size[skip:], dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            if layer is None or chunk.offsets[0] == layer:
                ranges = zip(chunk.offsets[skip:], chunk.sizes[skip:], strict=True)
                part = whole[tuple(slice(start, start + size) for start, size in ranges)]
                part.copy_(self._piece(name, chunk).reshape(part.shape))
        return whole

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self.places[MetadataIndex(name, chunk.offsets)]
        with (self.path / place.relative_path).open("rb") as handle:
            handle.seek(place.offset)
            return torch.load(io.BytesIO(handle.read(place.length)), map_location="cpu", weights_only=True)


def saved_name(mcore: str) -> str:
    """Under which name a parameter is saved: without its layer, and norms under the names that fused layers give them."""
    for own, fused in typing.cast(Any, layer_spec().submodules).sharded_state_dict_keys_map.items():
        mcore = mcore.replace("{i}." + own, "{i}." + fused)
    return mcore.replace(".{i}", "")


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that is meant: `source` itself, the one that a file `latest` or `best` names, or a run's newest whole one.

    Reads every byte of it: to be called once, by one rank, before its tensors are used.

    Raises:
        UserError: there is none, or the one that was named is damaged.
    """
    if source.is_file():
        source = source.parent / source.read_text(encoding="utf-8").strip()
    if (source / files.MANIFEST).exists():
        wrong = files.damage(source)
        if wrong:
            raise UserError(f"{source}: {wrong}; name another checkpoint in export.checkpoint")
        return source
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    for path in files.finished(folder):
        wrong = files.damage(path)
        if wrong is None:
            return path
        say(f"checkpoint {path.name} is damaged: {wrong}; falling back to the one before")
    raise UserError(f"{source}: holds no training checkpoint; run distill first, or set export.checkpoint")


def checkpoint_id(path: Path) -> str:
    """Identifies a checkpoint: its name and the hash of its manifest, which hashes the rest."""
    return f"{path.name}:{sha256_file(path / files.MANIFEST)}"


def export(path: Path, target: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write the student of a checkpoint, its config.json and its tokenizer into the empty folder `target`.

    Args:
        path: what `find_checkpoint` gave.
        dtype: float32, bfloat16 or float16; None keeps the type that config.json names, if it is one of them.

    Raises:
        UserError: an unknown dtype, or a weight beyond its range.
    """
    model = path.parent / MODEL
    config = read_json(model / "config.json")
    shape, table = shape_from_config(config, str(model / "config.json")), architecture(str(config["model_type"]))
    name = dtype or default_dtype(config)
    if name not in DTYPES:
        raise UserError(f"export.dtype={name}: must be one of {', '.join(DTYPES)}; choose one")
    saved = SavedTensors(path)

    def read(row: Row, i: int) -> list[Tensor]:
        return [saved.read(saved_name(row.mcore), i if row.per_layer else None)]

    remedy = "set export.dtype=bfloat16 or export.dtype=float32"
    tensors = (
        (tensor_name, cast(tensor, DTYPES[name], f"export.dtype={name}: tensor {tensor_name}", remedy))
        for tensor_name, tensor in export_tensors(table, shape, read)
    )
    write_folder(target, student_config(config, shape, DTYPES[name]), tensors, model)
    step = files.read_manifest(path)["step"]
    return {"checkpoint": path.name, "step": step, "dtype": name, "parameters": sum(table.parameters(shape).values())}


def default_dtype(config: Mapping[str, Any]) -> str:
    """The type that config.json names; float32 where it names none, or one that is not written (float64, say)."""
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) and named in DTYPES else "float32"
