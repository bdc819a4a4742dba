"""The source of an evaluated model: a Hugging Face folder, or a training checkpoint, which is read without an export."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitron_train.arch import Architecture, Shape, architecture
from minitron_train.arch.convert import Source, shards_to_parts
from minitron_train.hf import HFFolder, fingerprint, read_json, shape_from_config
from minitron_train.model.build import LanguageModel, build
from minitron_train.model.load import load_weights
from minitron_train.parallel.groups import Groups
from minitron_train.train import checkpoint_files
from minitron_train.train.export import SavedTensors, VerifiedCheckpoint, find_checkpoint, saved_place


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A model that can be built, with its identity and size.

    Attributes:
        path: the model's folder, or the checkpoint's.
        tokenizer: folder with the tokenizer and generation_config.json.
        identity: changes when the weights change.
        num_bytes: size of the weights in a Hugging Face folder.
    """

    path: Path
    shape: Shape
    table: Architecture
    source: Source
    tokenizer: Path
    identity: str
    num_bytes: int

    @property
    def num_parameters(self) -> int:
        """Number of parameters; tied weights count once."""
        return sum(self.table.parameters(self.shape).values())

    def build(self, groups: Groups, dtype: torch.dtype = torch.float32) -> LanguageModel:
        """Build the model at the tensor-parallel size of `groups`. Each rank reads its own shard."""
        model = build(self.shape, tp=groups.tp_size, dtype=dtype)
        load_weights(model, self.table, self.shape, self.source, groups.tp_rank, groups.tp_size)
        return model


class SavedSource:
    """Reads Hugging Face tensors from a training checkpoint, one at a time."""

    def __init__(self, checkpoint: VerifiedCheckpoint, table: Architecture, shape: Shape) -> None:
        self.saved, self.shape = SavedTensors(checkpoint), shape
        self.rows = {
            name.format(i=i): (row, i) for row in table.rows_of(shape) for i in row.layers(shape) for name in row.hf
        }

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the tensor `name`, or its slice [start, stop) along `dim`."""
        row, i = self.rows[name]
        fused = self.saved.read(*saved_place(self.shape, row, i))
        parts = shards_to_parts(row, self.shape, [fused])
        tensor = next(part for key, part in parts.items() if key.format(i=i) == name)
        return (
            tensor if dim is None else tensor.narrow(dim, start, (tensor.shape[dim] if stop is None else stop) - start)
        )


def is_training(path: Path) -> bool:
    """Whether a path is a training checkpoint or a run with checkpoints. A folder with a config.json is a model."""
    if (path / "config.json").exists():
        return False
    return (path / checkpoint_files.MANIFEST).exists() or (path / "checkpoints").is_dir()


def locate(path: Path, output_dir: Path, *, trust_external: bool) -> Path | VerifiedCheckpoint:
    """Resolve `eval.model`: a Hugging Face folder, a checkpoint, or a run, whose newest undamaged checkpoint is used.

    Never call it for a folder that must be a model, such as teacher.path, because it may return a checkpoint.

    Raises:
        UserError: the checkpoint is damaged or not trusted (see `find_checkpoint`).
    """
    return find_checkpoint(path, output_dir, trust_external=trust_external) if is_training(path) else path


def open_origin(model: Path | VerifiedCheckpoint) -> Origin:
    """Open a Hugging Face folder or a checkpoint from `locate`. Only headers are read.

    Raises:
        UserError: a header is damaged or missing.
    """
    if isinstance(model, Path):
        checkpoint = HFFolder(model)
        return Origin(
            path=model,
            shape=checkpoint.shape,
            table=checkpoint.table,
            source=checkpoint,
            tokenizer=model,
            identity=fingerprint(model),
            num_bytes=sum(file.stat().st_size for file in set(checkpoint.files.values())),
        )
    config = model.model / "config.json"
    shape = shape_from_config(read_json(config), str(config))
    table = architecture(shape.architecture)
    return Origin(
        path=model.path,
        shape=shape,
        table=table,
        source=SavedSource(model, table, shape),
        tokenizer=model.model,
        identity=model.identity,
        num_bytes=sum(table.parameters(shape).values()) * 4,
    )
