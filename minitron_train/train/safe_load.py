"""Training checkpoints read so that nothing in them can run: the one place that unpickles files.

megatron-core pickles `.metadata` with `pickle`, and `common.pt` and the pieces in `*.distcp` with `torch.save`. Whoever
can write such a file could run code in the process that loads it. Here `.metadata` may name only the classes in
`ALLOWED`, which are those that torch.distributed.checkpoint writes, and everything else goes through torch's
`weights_only` unpickler. Both refuse any other class with one line that names it.
"""

import io
import pickle
import re
from pathlib import Path
from typing import IO, Any, cast
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.records import read_bytes
from minitron_train.train.checkpoint_files import is_file_name

METADATA = ".metadata"
REMEDY = "the file is damaged or was not written by this program; name another checkpoint"

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
ALLOWED = frozenset(
    {
        "torch.Size",
        "torch.serialization._get_layout",
        *(f"torch.{dtype}" for dtype in DTYPES),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            f"torch.distributed.checkpoint.planner.{name}"
            for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
    }
)


class Refused(pickle.UnpicklingError):
    """A file names a class that is not allowed."""


class MetadataUnpickler(pickle.Unpickler):
    """Python's unpickler, with the classes of `ALLOWED` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """The class; Refused before its module is imported when it is not allowed."""
        if f"{module}.{name}" not in ALLOWED:
            raise Refused(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of the checkpoint `path`: which tensor is in which part of which file.

    Raises:
        UserError: it is missing, damaged, names a class that is not allowed, or names a file outside the checkpoint.
    """
    file = path / METADATA
    try:
        found = MetadataUnpickler(io.BytesIO(read_bytes(file))).load()
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; {REMEDY}") from error
    except Refused as error:
        raise not_allowed(file, str(error)) from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise UserError(f"{file}: damaged ({first_line(error)}); {REMEDY}") from None
    places = getattr(found, "storage_data", None)
    if type(found) is not Metadata or not isinstance(found.state_dict_metadata, dict) or not isinstance(places, dict):
        raise UserError(f"{file}: holds no checkpoint metadata; {REMEDY}")
    for index, place in places.items():
        if not (type(index) is MetadataIndex and type(place) is _StorageInfo and is_file_name(place.relative_path)):
            raise UserError(f"{file}: places a tensor outside the checkpoint's own files; {REMEDY}")
        if not all(type(number) is int and 0 <= number < 2**63 for number in (place.offset, place.length)):
            raise UserError(f"{file}: places a tensor at bytes that no file has; {REMEDY}")
    return found


def read_tensors(source: Path | IO[bytes], where: str) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain containers only.

    Args:
        source: a file, or its bytes.
        where: names it in a refusal.

    Raises:
        UserError: it is missing, damaged or holds an object of another class, which is named.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file; {REMEDY}") from error
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, … on damaged files
        named = re.search(r"(?:GLOBAL|global:?) ([\w.]+\.\w+)", str(error))
        if named:
            raise not_allowed(where, named[1]) from None
        raise UserError(f"{where}: damaged ({first_line(error)}); {REMEDY}") from None


def not_allowed(where: Path | str, name: str) -> UserError:
    """The refusal of a file that names a class which no checkpoint needs."""
    return UserError(
        f"{where}: names {name}, which no checkpoint of this program holds, so nothing of it is loaded; {REMEDY}"
    )


class SafeReader(CachedMetadataFileSystemReader):
    """torch's reader of a checkpoint's folder with `read_metadata` from here."""

    def read_metadata(self) -> Metadata:
        """The metadata, read once."""
        if self._cached_metadata is None:
            self._cached_metadata = read_metadata(Path(self.path))
            self._cached_metadata.storage_meta = self._cached_metadata.storage_meta or StorageMeta()
            self._cached_metadata.storage_meta.load_id = self.load_id
        return self._cached_metadata


class SafePlanner(torch_strategy.MCoreLoadPlanner):
    """megatron-core's planner; torch's own `load_bytes` unpickles any class (weights_only=False)."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take over one object that is not a tensor, such as a layer's `_extra_state`."""
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], read_tensors(value, name))


class SafeShards(torch_strategy.TorchDistLoadShardedStrategy):
    """megatron-core's loading of sharded tensors, through SafeReader and SafePlanner; no argument reaches these."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        """Fill a sharded state dict."""
        reader = mock.patch.object(torch_strategy, "_get_filesystem_reader", lambda path, **_: SafeReader(path))
        with reader, mock.patch.object(torch_strategy, "MCoreLoadPlanner", SafePlanner):
            return super().load(sharded_state_dict, checkpoint_dir)


class SafeCommon(TorchCommonLoadStrategy):
    """megatron-core's loading of what is not sharded, with `weights_only`."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """The contents of common.pt."""
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        return read_tensors(path, str(path))


def load(template: dict[str, Any], path: Path) -> dict[str, Any]:
    """megatron-core's `dist_checkpointing.load` of our own checkpoints; collective.

    Args:
        template: sharded state dict, whose tensors are filled.

    Raises:
        UserError: on every rank, when a file is refused (see `read_metadata`, `read_tensors`).
    """
    read_metadata(path)  # refuse on every rank, before the first collective
    try:
        return cast(dict[str, Any], dist_checkpointing.load(template, str(path), SafeShards(), SafeCommon()))
    except CheckpointException as error:
        refused = [failure for failure, _ in error.failures.values() if isinstance(failure, UserError)]
        if refused:
            raise UserError(f"{path}: {refused[0]}") from None
        raise
