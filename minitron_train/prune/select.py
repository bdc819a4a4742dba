"""Which channels, heads, neurons and layers stay: the highest scores that make a valid student."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_train.arch.rules import check_rules
from minitron_train.arch.shape import SIZES, Shape
from minitron_train.config import PruneConfig
from minitron_train.errors import UserError
from minitron_train.prune.scores import Importance, Scores

FILE = "kept.safetensors"


@dataclass(frozen=True, slots=True)
class Keep:
    """Kept indices of the teacher, ascending, int64; `heads`, `groups` and `ffn` by teacher layer."""

    teacher: Shape
    student: Shape
    embedding: Tensor
    layers: Tensor
    heads: dict[int, Tensor]
    groups: dict[int, Tensor]
    ffn: dict[int, Tensor]

    def rows(self, axis: str, layer: int) -> Tensor | None:
        """Kept positions along a named axis (see arch.table) in teacher layer `layer`; None keeps all of them."""
        if axis == "embd":
            kept, size = self.embedding, 1
        elif axis == "ffn":
            kept, size = self.ffn[layer], 1
        elif axis == "q":
            kept, size = self.heads[layer], self.teacher.kv_channels
        elif axis == "kv":
            kept, size = self.groups[layer], self.teacher.kv_channels
        else:
            return None
        if len(kept) * size == self.teacher.axis_size(axis):
            return None
        return (kept[:, None] * size + torch.arange(size)).flatten()

    def tensors(self) -> dict[str, Tensor]:
        """By their names in kept.safetensors: `layers.{i}` is the teacher's layer i."""
        named = {"embedding": self.embedding, "layers": self.layers}
        for kind, kept in (("heads", self.heads), ("groups", self.groups), ("ffn", self.ffn)):
            named |= {f"layers.{i}.{kind}": index for i, index in kept.items()}
        return named

    def write(self, folder: Path) -> None:
        """kept.safetensors."""
        save_file({name: index.contiguous() for name, index in self.tensors().items()}, folder / FILE)


def select(scores: Scores, prune: PruneConfig, teacher: Shape, student: Shape) -> Keep:
    """Rank every axis and keep the best.

    Heads are ranked inside their KV group and every group keeps the same number, so that the student is a valid
    grouped-query model (arXiv 2407.14679 prunes query heads only). Layers are dropped lowest block importance first.

    Raises:
        UserError: the student is not smaller in the sense of Shape.smaller, or breaks prune.multiple_of.
    """
    check_target(teacher, student, prune)
    importance = scores.importance(teacher, prune)
    layers = keep_layers(importance, student.num_layers)
    return Keep(
        teacher,
        student,
        embedding=best(importance.embedding, student.hidden_size),
        layers=layers,
        heads={i: best_heads(importance.heads[i], teacher, student) for i in layers.tolist()},
        groups={i: torch.arange(teacher.num_query_groups) for i in layers.tolist()},
        ffn={i: best(importance.ffn[i], student.ffn_hidden_size) for i in layers.tolist()},
    )


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; of equal scores the first wins."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def best_heads(scores: Tensor, teacher: Shape, student: Shape) -> Tensor:
    """The best query heads of every KV group, the same number in each."""
    per_group = student.num_attention_heads // student.num_query_groups
    grouped = scores.view(teacher.num_query_groups, -1)
    kept = torch.stack([best(group, per_group) for group in grouped])
    return (kept + torch.arange(len(grouped))[:, None] * grouped.shape[1]).flatten()


def keep_layers(importance: Importance, count: int) -> Tensor:
    """The `count` layers of highest block importance, in the teacher's order."""
    return best(torch.cat(importance.block), count)


def check_target(teacher: Shape, student: Shape, prune: PruneConfig) -> None:
    """Refuse a student that cannot be cut out of the teacher, before any work."""
    teacher.smaller(**{key: getattr(student, key) for key in SIZES})
    check_rules(student, "student")
    if student.num_query_groups != teacher.num_query_groups:
        raise UserError(
            f"student.num_query_groups={student.num_query_groups}: the teacher's {teacher.num_query_groups} are kept; "
            "leave it out"
        )
    for key in ("hidden_size", "ffn_hidden_size"):
        value = getattr(student, key)
        if value != getattr(teacher, key) and value % prune.multiple_of:
            raise UserError(
                f"student.{key}={value}: must be a multiple of prune.multiple_of={prune.multiple_of}; "
                f"choose {value // prune.multiple_of * prune.multiple_of or prune.multiple_of}"
            )
