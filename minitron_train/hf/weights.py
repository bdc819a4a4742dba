"""The tensors of a Hugging Face folder: which file holds which, and their bytes."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minitron_train.arch import architecture
from minitron_train.errors import UserError
from minitron_train.hf.config import read_json, shape_from_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
