"""Describes what pruning would do, for dry_run."""

from minitron_train.arch import architecture
from minitron_train.arch.shape import Shape
from minitron_train.config import Merge, PruneConfig, Refit
from minitron_train.planning.counts import assumed_layers
from minitron_train.pruning.criterion import depth_criterion, width_criterion

REFITTED = {Refit.outputs: "outputs of attention and MLP", Refit.all: "all linear layers"}


def describe(teacher: Shape, student: Shape, prune: PruneConfig) -> list[str]:
    """One line for each size that is kept, each criterion that ranks, and each repair."""
    before, after = (sum(architecture(shape.architecture).parameters(shape).values()) for shape in (teacher, student))
    lines = [f"keeps   {after:,} of {before:,} parameters"]
    lines += [f"keeps   {size} {kept} of {getattr(teacher, size)}" for size, kept in student.sizes().items()]
    lines.append(f"ranks   {prune.width}: {width_criterion(prune.width).summary}")
    ranked = f"batch {prune.batch_aggregation.value}, sequence {prune.sequence_aggregation.value}"
    scopes = f"heads per {prune.heads_scope.value}, neurons per {prune.ffn_scope.value}"
    lines.append(f"ranks   preset {prune.preset}: {ranked}; {scopes} ({prune.neuron_activation}-activation)")
    if prune.drop_layers is not None:
        lines.append(f"drops   layers {', '.join(map(str, prune.drop_layers))}")
    elif student.num_layers < teacher.num_layers:
        lines.append(f"ranks   layers, {prune.depth}: {depth_criterion(prune.depth).summary}")
    if assumption := assumed_layers(teacher, student, prune.drop_layers):
        lines.append(f"assumes {assumption}")
    if prune.head_merge is not Merge.none:
        lines.append(f"merges  dropped heads into kept ones: {prune.head_merge.value}")
    repairs = ["norms rescaled"] if prune.norm_scale else []
    repairs += [f"least squares, {REFITTED[prune.refit]}"] if prune.refit is not Refit.none else []
    if prune.rotate and student.hidden_size < teacher.hidden_size:
        lines.append("rotates the residual stream to its principal directions, from calibration tokens")
    return [*lines, *(f"repairs {repair}" for repair in repairs)]
