"""What pruning would do, in words: for dry_run."""

from minitron_train.arch import architecture
from minitron_train.arch.shape import SIZES, Shape
from minitron_train.config import PruneConfig


def describe(teacher: Shape, student: Shape, prune: PruneConfig) -> list[str]:
    """Lines that say what is kept of each axis, and how it is ranked."""
    before, after = (sum(architecture(shape.architecture).parameters(shape).values()) for shape in (teacher, student))
    lines = [f"keeps   {after:,} of {before:,} parameters"]
    lines += [f"keeps   {key} {getattr(student, key)} of {getattr(teacher, key)}" for key in SIZES]
    ranked = f"batch {prune.batch_aggregation.value}, sequence {prune.sequence_aggregation.value}"
    scopes = f"heads per {prune.heads_scope.value}, neurons per {prune.ffn_scope.value}"
    return [*lines, f"ranks   preset {prune.preset}: {ranked}; {scopes} ({prune.neuron_activation}-activation)"]
