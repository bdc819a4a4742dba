"""The pruning stage: scores -> kept indices -> repaired or plainly sliced checkpoint."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from minitron_train import hf
from minitron_train.arch.shape import Shape
from minitron_train.config import Config
from minitron_train.parallel.groups import Groups
from minitron_train.pruning.basis import principal_basis, why_not
from minitron_train.pruning.collect import Statistics
from minitron_train.pruning.criterion import Evidence, depth_criterion
from minitron_train.pruning.importance import Scores
from minitron_train.pruning.layers import Layers, RowSource
from minitron_train.pruning.scoring import check_tokens, gather_evidence, scoring_dtype
from minitron_train.pruning.select import Keep, select
from minitron_train.pruning.shards import RowReader
from minitron_train.pruning.slice import Sliced, slice_checkpoint
from minitron_train.pruning.target import check_target, num_repair_sequences
from minitron_train.runtime.console import say


def prune_checkpoint(
    config: Config,
    groups: Groups,
    *,
    teacher: hf.HFFolder,
    student: Shape,
    scores: Path,
    tokens: Callable[[], Tensor],
    folder: Path,
) -> dict[str, Any]:
    """Prune `teacher` to `student`; the first rank writes the Hugging Face folder, with kept.safetensors.

    The other ranks do not wait for the writing, because 15 B parameters take longer than a collective's timeout.

    Args:
        scores: the file that `score` wrote.
        tokens: returns the calibration tokens [batches, sequences, length]; called only for rotation, repair or steps.

    Returns:
        Facts for the stage's provenance.

    Raises:
        UserError: the teacher cannot be pruned to the target, the scores are another teacher's, or tokens are too few.
    """
    student.check_parallel(groups.tp_size, "student")
    check_target(teacher.shape, student, config.prune)
    statistics = Scores.read(scores, teacher).statistics
    keep = choose(config, groups, teacher, student, statistics, tokens)
    changed = repaired_tensors(config, groups, teacher, keep, tokens()) if config.prune.repairs else iter(())
    facts: dict[str, Any] = {}
    if groups.is_first:
        facts = slice_checkpoint(teacher, keep, keep.student, folder, changed) | {"rotated": keep.basis is not None}
    for _ in changed:  # the other ranks share the work of a repair; the first one writes
        pass
    return facts


def choose(
    config: Config,
    groups: Groups,
    teacher: hf.HFFolder,
    student: Shape,
    statistics: Statistics,
    tokens: Callable[[], Tensor],
) -> Keep:
    """Choose what is kept, in prune.iterations steps; each later step scores the model that the previous one left.

    After step t of T, every size is teacher - t (teacher - student) / T (arXiv 2407.14679 §2.2).
    """
    keep, num_steps = None, config.prune.iterations
    source: RowSource = RowReader(teacher)
    needs_layer_removal = depth_criterion(config.prune.depth).needs_layer_removal
    if num_steps > 1:
        check_tokens(tokens().flatten(0, 1), teacher, groups.dp_size)
    for step in range(1, num_steps + 1):
        shape = between(teacher.shape, student, step, num_steps, groups.tp_size)
        evidence = Evidence(
            statistics=statistics,
            source=source,
            table=teacher.table,
            shape=keep.student if keep else teacher.shape,
            prune=config.prune,
            seed=config.seed,
        )
        chosen = select(evidence, shape)
        keep = keep.then(chosen) if keep else chosen
        if step < num_steps:
            dtype = scoring_dtype(config.calibration, groups)
            source = Sliced(teacher, keep)
            layers = Layers(teacher.table, keep.student, source, groups, resident=False, dtype=dtype)
            statistics = gather_evidence(layers, tokens(), config.calibration, without_layers=needs_layer_removal)
    assert keep is not None
    if config.prune.rotate and student.hidden_size < teacher.shape.hidden_size:
        keep = rotated(config, groups, teacher, keep, tokens())
    return keep


def between(teacher: Shape, student: Shape, step: int, num_steps: int, tp: int) -> Shape:
    """The shape after one step. Heads per KV group shrink like a size; sizes split over `tp` ranks stay multiples of it."""

    def left(have: int, want: int, unit: int = 1) -> int:
        return want + (have - want) * (num_steps - step) // num_steps // unit * unit

    if step == num_steps:
        return student
    split = ("ffn_hidden_size", "num_query_groups", "moe_shared_expert_intermediate_size", "dense_ffn_hidden_size")
    units: dict[str, int] = dict.fromkeys(split, tp)
    sizes = {key: left(getattr(teacher, key), getattr(student, key), units.get(key, 1)) for key in teacher.sizes()}
    per_group = left(*(shape.num_attention_heads // shape.num_query_groups for shape in (teacher, student)))
    return teacher.smaller(**sizes | {"num_attention_heads": per_group * sizes["num_query_groups"]})


def rotated(config: Config, groups: Groups, teacher: hf.HFFolder, keep: Keep, tokens: Tensor) -> Keep:
    """`keep` with principal directions of the residual stream instead of channels, if the teacher can be rotated."""
    sequences_NS, whole = tokens.flatten(0, 1), whole_layers(groups)
    used = num_repair_sequences(config.prune, sequences_NS.shape[1])
    layers = Layers(teacher.table, teacher.shape, RowReader(teacher), whole, resident=False)
    if reason := why_not(layers, keep.student.hidden_size):
        say(f"prune.rotate: this teacher cannot be rotated ({reason}); keeping channels instead")
        return keep
    size, dtype = config.calibration.micro_batch_size, scoring_dtype(config.calibration, groups)
    return replace(keep, basis=principal_basis(layers, sequences_NS[:used], keep.student.hidden_size, size, dtype))


def repaired_tensors(
    config: Config, groups: Groups, teacher: hf.HFFolder, keep: Keep, tokens: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of repaired tensors."""
    from minitron_train.pruning.repair import Repair

    sequences_NS = tokens.flatten(0, 1)
    used = num_repair_sequences(config.prune, sequences_NS.shape[1])
    whole = whole_layers(groups)
    before = Layers(teacher.table, teacher.shape, RowReader(teacher), whole, resident=False)
    after = Layers(teacher.table, keep.student, Sliced(teacher, keep), whole, resident=False)
    size, dtype = config.calibration.micro_batch_size, scoring_dtype(config.calibration, groups)
    return Repair(before, after, keep, config.prune, sequences_NS[:used], size, dtype).tensors()


@functools.cache
def whole_layers(groups: Groups) -> Groups:
    """The same processes without tensor parallelism, all data parallel. Cached, because it creates a process group."""
    if groups.tp_size == 1:
        return groups
    alone = dist.new_group([groups.rank], use_local_synchronization=True)  # each process creates only its own
    return replace(
        groups,
        tp_rank=0,
        tp_size=1,
        dp_rank=groups.rank,
        dp_size=groups.world_size,
        tp_group=alone,
        dp_group=dist.group.WORLD,
    )
