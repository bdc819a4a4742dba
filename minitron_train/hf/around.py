"""The tensors of a vision-language folder: those of the text model under its own names, and the rest."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minitron_train.arch.wrappers import Wrapper
from minitron_train.hf.dtypes import STORED_DTYPES
from minitron_train.hf.headers import Entry, read_header, shown
from minitron_train.hf.locate import Weights
from minitron_train.hf.rows import values_of
from minitron_train.runtime.errors import UserError

PREFIX = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?=(?:layers|embed_tokens|norm)\.)")
OUTPUT = re.compile(r"^(?:language_model\.)?(?=lm_head\.)")
NEW = "model."  # start of all names but the output layer's, in folders of some releases of transformers
FILE = "around.safetensors"  # the rest, next to a training's checkpoints


def text_name(stored: str) -> str | None:
    """Name of a stored tensor inside the text model; None if it belongs to the rest."""
    if PREFIX.match(stored):
        return NEW + PREFIX.sub("", stored)
    return OUTPUT.sub("", stored) if OUTPUT.match(stored) else None


def split(weights: Weights) -> tuple[Weights, dict[str, Entry]]:
    """The text model's tensors under its own names, and the rest by stored name.

    Raises:
        UserError: a tensor of the rest is stored twice, or cannot be copied.
    """
    text: dict[str, list[Entry]] = {}
    rest: dict[str, Entry] = {}
    for stored, entries in weights.tensors.items():
        name = text_name(stored)
        if name is not None:
            text.setdefault(name, []).extend(entries)
        elif len(entries) > 1 or entries[0].dtype not in STORED_DTYPES:
            raise UserError(
                f"{weights.folder}: tensor {shown(stored)} is stored twice or has type {entries[0].dtype}; "
                f"supported: {', '.join(STORED_DTYPES)}; download the checkpoint again"
            )
        else:
            rest[stored] = entries[0]
    return replace(weights, tensors=text), rest


def stored_name(name: str, wrapper: Wrapper | None, rest: Iterable[str]) -> str:
    """The name under which a folder with this `rest` stores the text model's tensor `name`."""
    if wrapper is None:
        return name
    is_new = any(other.startswith(NEW) for other in rest)
    if not name.startswith(NEW):
        return name if is_new else wrapper.output
    return (f"{NEW}language_model." if is_new else wrapper.prefix) + name.removeprefix(NEW)


def values(entry: Entry) -> Tensor:
    """A tensor of the rest, as it is stored."""
    return values_of(entry, 0, prod(entry.size)).view(entry.size)


def write_rest(folder: Path, rest: Mapping[str, Entry]) -> None:
    """Write the rest next to a training's checkpoints, for export; nothing if there is none."""
    if rest:
        save_file({name: values(entry) for name, entry in rest.items()}, folder / FILE)


def read_rest(folder: Path) -> dict[str, Entry]:
    """What `write_rest` wrote."""
    return read_header(folder / FILE) if (folder / FILE).exists() else {}


def with_rest(
    tensors: Iterable[tuple[str, Tensor]], wrapper: Wrapper | None, rest: Mapping[str, Entry]
) -> Iterator[tuple[str, Tensor]]:
    """The text model's tensors under their stored names, then the rest."""
    for name, tensor in tensors:
        yield stored_name(name, wrapper, rest), tensor
    for name, entry in rest.items():
        yield name, values(entry)
