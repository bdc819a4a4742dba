"""Export the student of a training checkpoint to a Hugging Face folder, tensor by tensor, on one process.

The module reads the files of torch.distributed.checkpoint directly. It needs neither process groups nor a model, and it
accepts checkpoints of any parallel layout. megatron-core stacks each parameter over the layers, [layers, …], and stores
one chunk per layer and rank. Where layers with experts and dense layers alternate, each layer has tensors of its own.
"""

import itertools
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from minitron_train.arch import ParamSpec, Shape, architecture
from minitron_train.arch.convert import export_tensors, stored
from minitron_train.hf import (
    DTYPES,
    cast,
    named_dtype,
    read_json,
    read_rest,
    shape_from_config,
    student_config,
    with_rest,
    wrapper_of,
    write_folder,
)
from minitron_train.model.build import expert_layers, layer_spec
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import sha256_file
from minitron_train.stages import read_provenance, read_started_record
from minitron_train.train import checkpoint_files as files
from minitron_train.train.safe_load import REMEDY, read_metadata, read_piece

MODEL = "model"  # folder next to the checkpoints, with config.json and tokenizer of the student
RUNS = ("train", "pretrain/train")  # training folders of an output folder


@dataclass(frozen=True, slots=True)
class VerifiedCheckpoint:
    """A checkpoint that is safe to load. Only `find_checkpoint` creates one.

    Its files match their hashes. It belongs to a training of this output folder, or checkpoint.trust_external is set.
    """

    path: Path

    @property
    def model(self) -> Path:
        """The folder with config.json and tokenizer."""
        return self.path.parent / MODEL

    @property
    def identity(self) -> str:
        """The checkpoint's name and the hash of its manifest. The manifest holds the hashes of all other files."""
        return f"{self.path.name}:{sha256_file(self.path / files.MANIFEST)}"


class SavedTensors:
    """The tensors of one checkpoint, read on demand."""

    def __init__(self, checkpoint: VerifiedCheckpoint) -> None:
        self.path = checkpoint.path
        metadata = read_metadata(self.path)
        self.tensors, self.places = metadata.state_dict_metadata, metadata.storage_data or {}

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """Read a tensor, or one layer of a tensor that is stacked over the layers.

        Raises:
            UserError: the tensor or one of its chunks is missing or damaged.
        """
        entry = self.tensors.get(name)
        skip = 0 if layer is None else 1
        try:
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [chunk for chunk in entry.chunks if layer is None or chunk.offsets[0] == layer]
            require_cover(entry.size, chunks, skip)
            whole = torch.empty(entry.size[skip:], dtype=entry.properties.dtype)
            for chunk in chunks:
                ranges = zip(chunk.offsets[skip:], chunk.sizes[skip:], strict=True)
                part = whole[tuple(slice(start, start + size) for start, size in ranges)]
                part.copy_(self._piece(name, chunk).reshape(part.shape))
            return whole
        except UserError:
            raise
        except (
            AssertionError,
            AttributeError,
            FileNotFoundError,
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            which = name if layer is None else f"{name}, layer {layer}"
            raise UserError(
                f"{self.path}: tensor {which} is missing or incomplete ({first_line(error)}); {REMEDY}"
            ) from error

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self.places[MetadataIndex(name, chunk.offsets)]
        piece = read_piece(self.path, place, name)
        if not isinstance(piece, Tensor) or piece.numel() != math.prod(chunk.sizes):
            raise UserError(
                f"{self.path / place.relative_path}: its chunk of {name} is not a tensor of shape {list(chunk.sizes)}; {REMEDY}"
            )
        return piece


def require_cover(size: torch.Size, chunks: list[ChunkStorageMetadata], skip: int) -> None:
    """Require chunks that cover a tensor exactly once. Elements without a chunk would be uninitialised memory.

    Args:
        skip: leading dimensions of `size` to ignore; 1 for one layer of a stacked tensor.

    Raises:
        ValueError: chunks overlap, lie outside of the tensor, or do not cover it.
    """
    for chunk in chunks:
        for whole, start, length in zip(size, chunk.offsets, chunk.sizes, strict=True):
            if min(start, length) < 0 or start + length > whole:
                raise ValueError(f"the chunk at {list(chunk.offsets)} lies outside of {list(size)}")
    for one, other in itertools.combinations(chunks, 2):
        edges = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
        if all(start < begin + length and begin < start + size for start, size, begin, length in edges):
            raise ValueError(f"the chunks at {list(one.offsets)} and {list(other.offsets)} overlap")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size[skip:]):
        raise ValueError(f"the chunks do not cover {list(size)}")


def saved_place(shape: Shape, row: ParamSpec, i: int) -> tuple[str, int | None]:
    """Name of layer `i`'s parameter in a checkpoint, with the norm names of fused layers, and its index in a stacked tensor."""
    name = row.mcore
    for own, fused in typing.cast(Any, layer_spec().submodules).sharded_state_dict_keys_map.items():
        name = name.replace("{i}." + own, "{i}." + fused)
    if expert_layers(shape) or not row.per_layer:
        return name.format(i=i), None
    return name.replace(".{i}", ""), i


def find_checkpoint(source: Path, output_dir: Path, *, trust_external: bool) -> VerifiedCheckpoint:
    """Find and verify a checkpoint. The function reads all of its bytes, so call it once, on one rank.

    Args:
        source: a checkpoint, a file `latest` or `best` that names one, or a run, whose newest undamaged checkpoint is used.
        output_dir: checkpoints of its own trainings are trusted (`is_own`).
        trust_external: accept other checkpoints too (checkpoint.trust_external).

    Raises:
        UserError: no checkpoint was found, the named one is damaged, or it is not trusted.
    """
    if source.is_file():
        source = files.read_pointer(source)
    is_one = (source / files.MANIFEST).exists()
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = [source] if is_one else files.finished(folder)
    if found and not (trust_external or is_own(found[0], output_dir)):
        raise UserError(
            f"{source}: does not belong to a training in output_dir={output_dir}, so it is not loaded; set output_dir to "
            "that training's folder, or set checkpoint.trust_external=true if you trust its author"
        )
    for path in found:
        wrong = files.find_damage(path)
        if wrong is None:
            return VerifiedCheckpoint(path)
        if is_one:
            raise UserError(f"{source}: {wrong}; name another checkpoint in export.checkpoint")
        say(f"checkpoint {path.name} is damaged: {wrong}; falling back to the previous one")
    raise UserError(f"{source}: contains no training checkpoint; run distill first, or set export.checkpoint")


def is_own(path: Path, output_dir: Path) -> bool:
    """Whether a checkpoint lies in a training of `output_dir` that has a record written by this program."""
    for run in (output_dir / name for name in RUNS):
        recorded = bool(read_started_record(run) or read_provenance(run))
        inside = any(Path(form(path)).is_relative_to(form(run)) for form in (os.path.abspath, os.path.realpath))
        if recorded and inside:
            return True
    return False


def export_checkpoint(checkpoint: VerifiedCheckpoint, target: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write the student's weights, config.json and tokenizer into the empty folder `target`.

    Args:
        dtype: float32, bfloat16 or float16; None keeps the type in config.json if it is one of these.

    Returns:
        Facts for the provenance.

    Raises:
        UserError: an unknown dtype, or a weight that overflows it.
    """
    model = checkpoint.model
    config = read_json(model / "config.json")
    shape = shape_from_config(config, str(model / "config.json"))
    table = architecture(shape.architecture)
    name = dtype or default_dtype(config)
    if name not in DTYPES:
        raise UserError(f"export.dtype={name}: must be one of {', '.join(DTYPES)}; choose one")
    saved = SavedTensors(checkpoint)

    def read(row: ParamSpec, i: int) -> list[Tensor]:
        return [saved.read(*saved_place(shape, row, i))]

    remedy = "set export.dtype=bfloat16 or export.dtype=float32"
    tensors = (
        (tensor_name, cast(tensor, DTYPES[name], f"export.dtype={name}: tensor {tensor_name}", remedy))
        for tensor_name, tensor in export_tensors(table, shape, read)
    )
    written = with_rest(stored(table, shape, tensors), wrapper_of(config), read_rest(model))
    write_folder(target, student_config(config, shape, DTYPES[name]), written, model)
    return {
        "checkpoint": checkpoint.path.name,
        "step": files.read_manifest(checkpoint.path)["step"],
        "dtype": name,
        "parameters": sum(table.parameters(shape).values()),
    }


def default_dtype(config: Mapping[str, Any]) -> str:
    """Return the type in config.json; float32 if it is missing or cannot be written (float64, for example)."""
    named = named_dtype(config)
    return named if named in DTYPES else "float32"
