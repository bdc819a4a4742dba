"""The tensors of a Hugging Face folder, as transformers 5 would load them, under the names of the tables in arch/."""

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from minitron_train.arch import Shape, architecture
from minitron_train.arch.table import EMBEDDING, OUTPUT, Architecture, stacked
from minitron_train.hf.around import split, stored_name
from minitron_train.hf.config import read_json, shape_from_config
from minitron_train.hf.dtypes import STORED_DTYPES, named_dtype
from minitron_train.hf.fused_experts import with_single_experts
from minitron_train.hf.headers import Entry, shown
from minitron_train.hf.locate import INDEX, Weights, check_folder, has_weights, read_weights
from minitron_train.hf.nearest import check_family
from minitron_train.hf.reasons import method, missing_tensor, wrong_size, wrong_type
from minitron_train.hf.rows import RowReader, have_equal_values
from minitron_train.hf.wrapped import wrapper_of
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError

PREFIX = "model."  # prefix of all names but the output layer's; absent if only the base model was saved
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # a buffer that older versions stored; config.json determines it


class HFFolder:
    """The tensors of a Hugging Face folder, each read on demand.

    Opening a folder checks every header and every length, so that a truncated download is rejected before any work.
    `shape.tie_embeddings` follows the weights: a stored output layer that differs from the embedding is not tied.

    Attributes:
        stored: the position of each tensor of the model, by its name in the architecture's table. It may be a range of rows
            of the stored tensor that the position names.
        rest: tensors around a text model, by stored name: the vision model and the projector.
        writers: names of those of `rest` that write to the text model's residual stream.
        unexpected: names of stored tensors that are not part of the model.
        notes: one-line warnings, for `announce`.

    Raises:
        UserError: transformers and this program would not read the folder in the same way.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder = folder
        self.config = read_json(folder / "config.json")
        check_family(folder, self.config)
        shape = shape_from_config(self.config, str(folder / "config.json"))
        self.table = architecture(shape.architecture)
        self.wrapper = wrapper_of(self.config)
        weights, self.rest = read_weights(folder, self.config), {}
        if self.wrapper is not None:
            weights, self.rest = split(weights)
        weights = with_single_experts(weights, shape)
        self.shape = shape_as_stored(shape, self.table, weights)
        self.writers = self._find_writers()
        self.stored = self._find_tensors(weights)
        self.files = {name: entry.file for name, entry in self.stored.items()}
        self.sizes = {name: entry.size for name, entry in self.stored.items()}
        self.dtypes = {name: entry.dtype for name, entry in self.stored.items()}
        self.unexpected = self._unexpected(weights)
        self.notes = (*weights.notes, *self._notes(shape))

    def _find_tensors(self, weights: Weights) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for name, parts in self.table.each_stored(self.shape):  # lazily: a hostile config names a billion layers
            entry, size = find(name, self.shape, self.table, weights), stacked(parts)
            if entry is None:
                raise missing_tensor(self.folder, name, self.shape, weights.tensors, self.config)
            if entry.size != size:
                raise wrong_size(self.folder, name, size, entry, self.shape, weights.tensors, self.config)
            if entry.dtype not in STORED_DTYPES:
                raise wrong_type(self.folder, entry, self.config)
            found |= row_ranges(entry, parts)
        return found

    def _find_writers(self) -> frozenset[str]:
        found = sorted(name for name in self.rest if self.wrapper and self.wrapper.writers.search(name))
        for name in found:
            size = self.rest[name].size
            if not size or size[0] != self.shape.hidden_size:
                raise UserError(
                    f"{self.folder}: {shown(name)} has {size[0] if size else 'no'} rows, but {self.shape.wrapper} adds its "
                    f"output to a stream of {self.shape.hidden_size} channels; download the checkpoint again"
                )
        return frozenset(found)

    def _unexpected(self, weights: Weights) -> tuple[str, ...]:
        used = {entry.name for entry in self.stored.values()}
        if self.shape.tie_embeddings:
            used |= {PREFIX + output_name(self.table), output_name(self.table)}  # equal to the embedding
        stored = {name: entries[0].name for name, entries in weights.tensors.items() if name not in used}
        return tuple(name for name in stored.values() if name not in used and not HARMLESS.search(name))

    def _notes(self, configured: Shape) -> list[str]:
        notes = []
        if self.unexpected:
            some = ", ".join(map(shown, self.unexpected[:3])) + (", …" if len(self.unexpected) > 3 else "")
            notes.append(f"{len(self.unexpected)} stored tensors are not part of the model and are ignored: {some}")
        if configured.tie_embeddings and not self.shape.tie_embeddings:
            notes.append(
                "config.json ties the output layer to the embedding, but both are stored and differ; "
                "they stay separate, as in transformers"
            )
        if left := method(self.config):
            notes.append(
                f"config.json says that the weights are quantised ({left}), but the stored ones are not; "
                "the student is not quantised either"
            )
        if "F64" in self.dtypes.values():
            notes.append("float64 weights are read as float32, and so is the student unless export.dtype is narrower")
        dtype = self.config.get("dtype") or self.config.get("torch_dtype")
        if dtype is not None and named_dtype(self.config) is None:
            notes.append(
                f"config.json says dtype={shown(str(dtype))}; export writes float32 unless export.dtype names another"
            )
        return [f"{self.folder}: {note}" for note in notes]

    def written_name(self, name: str) -> str:
        """The name under which a student's folder stores the tensor `name` of the table."""
        return stored_name(name, self.wrapper, self.rest)

    def announce(self) -> None:
        """Print the warnings about this folder; call it once per command."""
        for note in self.notes:
            say(f"warning: {note}")

    @functools.cached_property
    def reader(self) -> RowReader:
        """The reader of these tensors, whole or by rows."""
        return RowReader(self)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """See RowReader.read."""
        return self.reader.read(name, dim, start, stop)


def row_ranges(entry: Entry, parts: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """The ranges of rows of a stored tensor that hold its parts, by the parts' names."""
    found, start = {}, entry.start
    for name, size in parts.items():
        num_bytes = entry.num_bytes // entry.size[0] * size[0]
        found[name] = replace(entry, size=size, start=start, num_bytes=num_bytes)
        start += num_bytes
    return found


def output_name(table: Architecture) -> str:
    """Hugging Face name of the output layer's weights."""
    return next(name for row in table.rows if row.mcore == OUTPUT for name in row.hf)


def embedding_name(table: Architecture) -> str:
    """Hugging Face name of the embedding's weights."""
    return next(name for row in table.rows if row.mcore == EMBEDDING for name in row.hf)


def spellings(name: str) -> tuple[str, ...]:
    """Stored names under which transformers finds tensor `name`: it adds and strips the base model's prefix."""
    bare = name.removeprefix(PREFIX)
    return tuple(dict.fromkeys((name, PREFIX + name, bare)))


def stored_as(name: str, weights: Weights) -> Entry | None:
    """The one stored tensor that is `name`.

    Raises:
        UserError: it is stored more than once, or the index names another file for it.
    """
    entries = [entry for spelling in spellings(name) for entry in weights.tensors.get(spelling, ())]
    if len(entries) > 1:
        places = " and ".join(f"{entry.name} in {entry.file.name}" for entry in entries[:2])
        raise UserError(
            f"{weights.folder}: tensor {name} is stored twice ({places}), and readers differ in which they take; "
            "keep one of them, or download the checkpoint again"
        )
    if entries and weights.index is not None:
        entry, named = entries[0], weights.index.get(entries[0].name)
        if named != entry.file.name:
            says = f"says {named}" if named else "does not name it"
            raise UserError(
                f"{weights.folder / INDEX}: tensor {entry.name} is in {entry.file.name}, the index {says}; "
                "readers differ in which they take; write the index again with save_pretrained, or download the checkpoint again"
            )
    return entries[0] if entries else None


def find(name: str, shape: Shape, table: Architecture, weights: Weights) -> Entry | None:
    """The stored tensor that is `name`; a tied embedding may be stored under the output layer's name alone."""
    entry = stored_as(name, weights)
    if entry is None and shape.tie_embeddings and name == embedding_name(table):
        return stored_as(output_name(table), weights)
    return entry


def shape_as_stored(shape: Shape, table: Architecture, weights: Weights) -> Shape:
    """`shape`, but untied if embedding and output layer are both stored and differ (as in transformers)."""
    if not shape.tie_embeddings:
        return shape
    head = stored_as(output_name(table), weights)
    embedding = stored_as(embedding_name(table), weights)
    if head is None or embedding is None or have_equal_values(head, embedding):
        return shape
    return shape.untied()


def folder_shape(folder: Path) -> Shape:
    """The shape of a Hugging Face folder's model: from its weights if it has some, else from config.json.

    Raises:
        UserError: see HFFolder.
    """
    check_folder(folder)
    if has_weights(folder):
        return HFFolder(folder).shape
    return shape_from_config(read_json(folder / "config.json"), str(folder / "config.json"))
