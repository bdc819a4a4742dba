"""The slicing stage: the kept rows and columns of every tensor, from one Hugging Face folder into another."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_train import hf
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import Axes
from minitron_train.prune.select import Keep


class Sliced:
    """The student as a view of its teacher: a Source (see arch.convert) that reads and cuts one tensor at a time."""

    def __init__(self, teacher: hf.Checkpoint, keep: Keep) -> None:
        self.teacher, self.keep = teacher, keep
        self.origin: dict[str, tuple[str, Axes, int]] = {}  # student tensor -> teacher tensor, axes, teacher layer
        for row in teacher.table.rows_of(keep.student):
            for i in row.layers(keep.student):
                layer = int(keep.layers[i])
                for name, axes in row.hf.items():
                    self.origin[name.format(i=i)] = (name.format(i=layer), axes, layer)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The student's tensor `name`, or its rows [start, stop) along `dim`."""
        source, axes, layer = self.origin[name]
        kept = [self.keep.rows(axis, layer) for axis in axes]
        if dim == 0 and kept[0] is None:  # rows that the student shares with the teacher: read only those
            tensor, kept = self.teacher.read(source, 0, start, stop), [None, *kept[1:]]
            dim = None
        else:
            tensor = self.teacher.read(source)
        for axis, index in enumerate(kept):
            tensor = tensor if index is None else tensor.index_select(axis, index)
        return tensor if dim is None else tensor.narrow(dim, start, (stop or tensor.shape[dim]) - start)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them, one after the other."""
        for name in self.origin:
            yield name, self.read(name).contiguous()


def slice_checkpoint(teacher: hf.Checkpoint, keep: Keep, student: Shape, folder: Path) -> dict[str, Any]:
    """Write the student's Hugging Face folder, with kept.safetensors, into the empty `folder`.

    Returns:
        Facts for the stage's provenance.
    """
    view = Sliced(teacher, keep)
    hf.write_folder(folder, hf.student_config(teacher.config, student), view.tensors(), teacher.folder)
    keep.write(folder)
    return {"parameters": check_parameters(hf.Checkpoint(folder), student)}


def check_parameters(written: hf.Checkpoint, student: Shape) -> int:
    """Parameters on disk, which must be the plan's: a student that silently stayed as large as its teacher is no student."""
    planned = sum(written.table.parameters(student).values())
    actual = sum(prod(size) for size in written.sizes.values())
    assert actual == planned, f"{written.folder}: {actual:,} parameters written, {planned:,} planned"
    return actual
