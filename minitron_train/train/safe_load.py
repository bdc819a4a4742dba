"""Load training checkpoints without running code from them. Only this module unpickles files.

megatron-core pickles `.metadata` with `pickle`; `torch.save` writes `common.pt` and the chunks in `*.distcp`. Whoever can
write such a file could run code in the process that loads it. Here `.metadata` may use only the classes in `ALLOWED`, the
ones that torch.distributed.checkpoint writes. torch's `weights_only` unpickler reads everything else. Any other class is
rejected with one line that names it.
"""

import io
import os
import pickle
import re
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from minitron_train.parallel import shims
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.records import open_file, read_bytes
from minitron_train.train.checkpoint_files import is_file_name
from minitron_train.train.shards import with_former_names

METADATA = ".metadata"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
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
    """A file uses a class that is not allowed."""


class MetadataUnpickler(pickle.Unpickler):
    """Python's unpickler, restricted to the classes of `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class. Raises Refused, before its module is imported, if it is not allowed."""
        if f"{module}.{name}" not in ALLOWED:
            raise Refused(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """Read the `.metadata` of the checkpoint `path`: the file and the byte range of each tensor.

    Raises:
        UserError: it is missing, damaged, uses a class that is not allowed, or names a file outside the checkpoint.
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
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{file}: damaged ({first_line(error)}); {REMEDY}") from None
    places = getattr(found, "storage_data", None)
    if type(found) is not Metadata or not isinstance(found.state_dict_metadata, dict) or not isinstance(places, dict):
        raise UserError(f"{file}: contains no checkpoint metadata; {REMEDY}")
    for index, place in places.items():
        if not (type(index) is MetadataIndex and type(place) is _StorageInfo and is_file_name(place.relative_path)):
            raise UserError(f"{file}: refers to a file outside the checkpoint; {REMEDY}")
        if not all(type(number) is int and 0 <= number < 2**63 for number in (place.offset, place.length)):
            raise UserError(f"{file}: has an impossible byte range for a tensor; {REMEDY}")
    return found


def read_tensors(source: Path | IO[bytes], where: str) -> Any:
    """Load tensors and plain containers that `torch.save` wrote, on the CPU.

    Args:
        source: a file, or its bytes.
        where: its name in an error message.

    Raises:
        UserError: it is missing, damaged, or contains an object of another class, which is named.
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


def read_piece(path: Path, place: _StorageInfo, name: str) -> Any:
    """Load what `torch.save` wrote into a byte range of one of the checkpoint's files.

    Raises:
        UserError: see `read_tensors`; or the file is too short.
    """
    file = path / place.relative_path
    with open_file(file) as handle:
        if place.offset + place.length > os.fstat(handle.fileno()).st_size:
            raise UserError(f"{file}: too short for its chunk of {name}; {REMEDY}")
        handle.seek(place.offset)
        return read_tensors(io.BytesIO(handle.read(place.length)), f"{file}: {name}")


def not_allowed(where: Path | str, name: str) -> UserError:
    """Return the error for a file that uses a class which no checkpoint needs."""
    return UserError(
        f"{where}: uses {name}, which no checkpoint of this program contains, so it is not loaded; {REMEDY}"
    )


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with the safe `read_metadata` of this module."""

    def read_metadata(self) -> Metadata:
        """Return the metadata, with the identity that torch gives to each load."""
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(torch_strategy.MCoreLoadPlanner):
    """megatron-core's planner with a safe `load_bytes`; torch's own unpickles any class (weights_only=False)."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one object that is not a tensor, such as a layer's `_extra_state`."""
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:  # megatron-core 0.16
            set_element(self.original_state_dict, self.mappings[name], read_tensors(value, name))
        else:
            self.state_dict[name] = read_tensors(value, name)


def read_common(path: Path) -> Any:
    """Read the state that is not sharded: common.pt, or since megatron-core 0.19 an object in one of the chunks.

    Raises:
        UserError: see `read_tensors`.
    """
    file = path / COMMON_FILE
    places = (read_metadata(path).storage_data or {}).items()
    place = next((place for index, place in places if index.fqn == COMMON_OBJECT), None)
    if place is None or file.exists():
        return read_tensors(file, str(file))
    return read_piece(path, place, COMMON_OBJECT)[0]


SAFE = {
    shims.LOAD_READER: lambda path, **_: SafeReader(path),
    shims.LOAD_PLANNER: SafePlanner,
    **{shim: lambda *args: read_common(Path(args[-1])) for shim in shims.LOAD_COMMON},  # a method or a function
}


def load(template: dict[str, Any], path: Path, dp_group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Load a checkpoint with megatron-core's `dist_checkpointing.load`; collective.

    Args:
        template: sharded state dict whose tensors are filled.
        dp_group: ranks that divide among them the reading of tensors which all of them need, and send them to each other.

    Raises:
        UserError: on every rank, when a file is rejected (see `read_metadata`, `read_tensors`).
    """
    names = read_metadata(path).state_dict_metadata  # raises on every rank, before the first collective
    template = with_former_names(template, names)
    reader: Any = torch_strategy.TorchDistLoadShardedStrategy()
    reader = FullyParallelLoadStrategyWrapper(reader, dp_group) if dp_group else reader
    try:
        with shims.replaced(SAFE):
            return cast(dict[str, Any], dist_checkpointing.load(template, str(path), reader))
    except CheckpointException as error:
        refused = [failure for failure, _ in error.failures.values() if isinstance(failure, UserError)]
        if refused:
            raise UserError(f"{path}: {refused[0]}") from None
        raise
