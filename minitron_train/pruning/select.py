"""Selects the channels, heads, neurons and layers to keep: the highest scores that make a valid student."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_train.arch.shape import Shape
from minitron_train.config import Merge
from minitron_train.pruning.basis import Basis
from minitron_train.pruning.criterion import Evidence, best, depth_criterion
from minitron_train.pruning.importance import Importance, importance
from minitron_train.runtime.errors import UserError

FILE = "kept.safetensors"
ALONE = -1  # partner of a kept head into which no dropped head is merged


@dataclass(frozen=True, slots=True)
class Keep:
    """Indices of the teacher that are kept, ascending, int64; dicts are by teacher layer."""

    teacher: Shape
    student: Shape
    embedding: Tensor
    layers: Tensor
    heads: dict[int, Tensor]
    kv_groups: dict[int, Tensor]
    ffn: dict[int, Tensor]  # of a layer with experts [kept experts, ffn_hidden_size], each row inside one expert
    partners: dict[int, Tensor]  # the dropped head that is merged into each kept head, or ALONE
    merge: Merge = Merge.none
    basis: Basis | None = None  # if set, the residual stream is rotated, and `embedding` is not used
    importance: Importance | None = None  # the teacher's scores that chose this; None after several steps
    experts: dict[int, Tensor] = field(default_factory=dict)  # of layers with experts
    shared: dict[int, Tensor] = field(default_factory=dict)  # neurons of the shared expert, of layers with one

    def rows(self, axis: str, layer: int, expert: int | None = None) -> Tensor | None:
        """Kept positions along a named axis (see arch.table) in teacher layer `layer`; None means all.

        Args:
            expert: the student's expert, for an axis inside one.
        """
        if axis == "embd":
            if self.basis is not None:
                return None
            kept, size = self.embedding, 1
        elif axis in ("ffn", "dense"):
            kept, size = self.ffn[layer] if expert is None else self.ffn[layer][expert], 1
        elif axis == "expert":
            kept, size = self.experts[layer], 1
        elif axis == "shared":
            kept, size = self.shared[layer], 1
        elif axis == "q":
            kept, size = self.heads[layer], self.teacher.kv_channels
        elif axis == "kv":
            kept, size = self.kv_groups[layer], self.teacher.kv_channels
        else:
            return None
        if len(kept) * size == self.teacher.axis_size(axis):
            return None
        return spread(kept, size)

    def tensors(self) -> dict[str, Tensor]:
        """The indices and scores by their names in kept.safetensors; `layers.{i}` is the teacher's layer i."""
        named = {"layers": self.layers}
        if self.basis is None:
            named["embedding"] = self.embedding
        else:
            named |= {"embedding.basis": self.basis.down_DH, "embedding.variance": self.basis.variance_D}
        kinds = {"heads": self.heads, "groups": self.kv_groups, "ffn": self.ffn, "shared": self.shared}
        if self.experts:
            first = {i: kept[:, None] * self.teacher.ffn_hidden_size for i, kept in self.experts.items()}
            inside = {i: (first[i] + self.ffn[i]).flatten() for i in first}
            kinds |= {"experts": self.experts, "ffn": self.ffn | inside}
        if self.merge is not Merge.none:
            kinds["partners"] = self.partners
        for kind, kept in kinds.items():
            named |= {f"layers.{i}.{kind}": index for i, index in kept.items()}
        chosen_by = self.importance.tensors() if self.importance else {}
        return named | {f"importance.{name}": value.float().cpu().clone() for name, value in chosen_by.items()}

    def write(self, folder: Path) -> None:
        """Write kept.safetensors."""
        save_file({name: index.contiguous() for name, index in self.tensors().items()}, folder / FILE)

    def then(self, after: "Keep") -> "Keep":
        """Combine this selection with `after`, made on its result. Neither may merge heads or rotate (see check_target)."""
        kept = after.layers.tolist()
        origin = {i: int(self.layers[i]) for i in kept}
        ffn = {i: self.ffn[origin[i]] for i in kept}
        for i, rows in ffn.items():
            if i in after.experts:  # each row of neurons is inside one of the experts that are left
                ffn[i] = rows[after.experts[i]].gather(1, after.ffn[i])
            else:
                ffn[i] = rows[after.ffn[i]]
        return Keep(
            self.teacher,
            after.student,
            embedding=self.embedding[after.embedding],
            layers=self.layers[after.layers],
            heads={origin[i]: self.heads[origin[i]][after.heads[i]] for i in kept},
            kv_groups={origin[i]: self.kv_groups[origin[i]][after.kv_groups[i]] for i in kept},
            ffn={origin[i]: rows for i, rows in ffn.items()},
            partners={origin[i]: torch.full_like(after.heads[i], ALONE) for i in kept},
            experts={origin[i]: self.experts[origin[i]][index] for i, index in after.experts.items()},
            shared={origin[i]: self.shared[origin[i]][index] for i, index in after.shared.items()},
        )


def spread(kept: Tensor, size: int) -> Tensor:
    """Expand indices of blocks of `size` rows to indices of rows."""
    return (kept[:, None] * size + torch.arange(size)).flatten()


def select(evidence: Evidence, student: Shape) -> Keep:
    """Rank every axis and keep the highest scores.

    Heads are ranked inside their KV group, and every group keeps the same number. So the student is a valid
    grouped-query model (arXiv 2407.14679 prunes query heads only). If the student has fewer KV groups, the groups whose
    kept heads score highest are kept. Experts are ranked inside their layer, their neurons inside each expert, and those of
    a shared expert inside it.
    Embedding channels are the same in all layers. The target must have passed check_target, or lie between such a target
    and the teacher.
    """
    teacher, scores = evidence.shape, importance(evidence)
    layers = keep_layers(evidence, student.num_layers)
    check_bound_layers(layers, teacher)
    check_experts_stay(layers, teacher)
    chosen = {i: best_heads(scores.heads[i], teacher, student) for i in layers.tolist()}
    student = student.with_layers([teacher.layer_kinds[i] for i in layers.tolist()])
    sparse = [i for i in layers.tolist() if not teacher.layer_kinds[i].is_dense]
    experts = {i: best(scores.experts[i], student.num_moe_experts) for i in sparse if scores.experts}
    widths = {i: student.unit_sizes(teacher.layer_kinds[i]) for i in layers.tolist()}
    return Keep(
        teacher,
        student,
        embedding=best(scores.embedding, student.hidden_size),
        layers=layers,
        heads={i: heads for i, (heads, _, _) in chosen.items()},
        kv_groups={i: kv_groups for i, (_, kv_groups, _) in chosen.items()},
        ffn={i: best_neurons(scores.ffn[i], experts.get(i), widths[i]["ffn"][-1]) for i in layers.tolist()},
        partners={i: partners for i, (_, _, partners) in chosen.items()},
        merge=evidence.prune.head_merge,
        importance=scores,
        experts=experts,
        shared={i: best(scores.shared[i], widths[i]["shared"][0]) for i in sparse if scores.shared},
    )


def best_neurons(scores: Tensor, experts: Tensor | None, count: int) -> Tensor:
    """Neurons to keep of an MLP, or of each kept expert, [experts, count]."""
    if experts is None:
        return best(scores, count)
    return torch.stack([best(scores[e], count) for e in experts.tolist()])


def check_bound_layers(layers: Tensor, teacher: Shape) -> None:
    """Reject a choice of layers without one of the first layers, to which the vision model adds image features."""
    bound = range(teacher.num_bound_layers)
    missing = next((i for i in bound if i not in layers.tolist()), None)
    if missing is not None:
        raise UserError(
            f"prune: layer {missing} would be dropped, but {teacher.wrapper} adds image features to the first "
            f"{len(bound)} layers; name later layers in prune.drop_layers"
        )


def check_experts_stay(layers: Tensor, teacher: Shape) -> None:
    """Reject a choice of dense layers alone from a model with experts."""
    if teacher.num_moe_experts and all(teacher.layer_kinds[i].is_dense for i in layers.tolist()):
        raise UserError(
            f"prune: layers {', '.join(map(str, layers.tolist()))} would be kept, and none of them has experts; "
            "name the layers to drop in prune.drop_layers"
        )


def best_heads(scores: Tensor, teacher: Shape, student: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Kept query heads (the same number in every kept KV group), kept KV groups, and the heads' partners.

    The first K of a group's L ranked heads are kept. Head 2K - i + 1, if it exists, is merged into head i: (K, K + 1),
    (K - 1, K + 2), … (arXiv 2407.14679 §2.2, where the printed range of i starts one too low).
    """
    per_group = student.num_attention_heads // student.num_query_groups
    grouped = scores.view(teacher.num_query_groups, -1)
    ranked = grouped.argsort(dim=1, descending=True, stable=True)
    kv_groups = best(grouped.gather(1, ranked[:, :per_group]).square().sum(1), student.num_query_groups)
    ranked = ranked[kv_groups] + kv_groups[:, None] * grouped.shape[1]
    heads, order = ranked[:, :per_group].sort(dim=1)
    dropped = ranked[:, per_group : 2 * per_group].flip(1)  # the partners of the last kept ranks
    partners = torch.full_like(heads, ALONE)
    partners[:, per_group - dropped.shape[1] :] = dropped
    return heads.flatten(), kv_groups, partners.gather(1, order).flatten()


def keep_layers(evidence: Evidence, num_layers: int) -> Tensor:
    """Layers to keep, ascending: all but prune.drop_layers, or the choice of prune.depth."""
    have, prune = evidence.shape.num_layers, evidence.prune
    if prune.drop_layers is not None:
        return torch.tensor([i for i in range(have) if i not in prune.drop_layers])
    if num_layers == have:
        return torch.arange(have)
    return depth_criterion(prune.depth).depth(evidence, num_layers)
