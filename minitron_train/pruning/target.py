"""Checks whether a teacher can be pruned to a student, before any work and for every shape of a search's grid."""

from minitron_train.arch import architecture
from minitron_train.arch.rules import check_rules, check_wrapper
from minitron_train.arch.shape import Shape
from minitron_train.config import CalibrationConfig, Merge, PruneConfig, Refit
from minitron_train.planning.stages import TOKENS_PER_INPUT, least_tokens
from minitron_train.runtime.errors import UserError


def check_request(teacher: Shape, student: Shape, prune: PruneConfig, calibration: CalibrationConfig) -> None:
    """Reject, before scoring, a target that the teacher cannot be pruned to, and a repair from too few tokens."""
    check_target(teacher, student, prune)
    if calibration.tokens_path is None:
        num_sequences = min(calibration.num_samples, num_repair_sequences(prune, calibration.seq_length))
        fitted = num_sequences - num_held_out(prune, num_sequences)
        check_enough(fitted * calibration.seq_length, student, prune)


def check_target(teacher: Shape, student: Shape, prune: PruneConfig) -> None:
    """Reject a student that the teacher cannot be pruned to."""
    teacher.smaller(prune.drop_layers, **student.sizes())
    check_wrapper(teacher, student)
    check_rules(student, "student")
    at_once = (
        (prune.rotate, "channels are cut in steps, directions at once", "rotate=false"),
        (prune.head_merge is not Merge.none, "later steps see no heads that an earlier one dropped", "head_merge=none"),
        (bool(prune.drop_layers), "each step numbers the layers that are left", "drop_layers=null"),
    )
    for asked, reason, remedy in at_once:
        if asked and prune.iterations > 1:
            raise UserError(f"prune.iterations={prune.iterations}: {reason}; set prune.iterations=1 or prune.{remedy}")
    if prune.head_merge is Merge.queries and architecture(teacher.architecture).has_projection_norms:
        raise UserError(
            f"prune.head_merge=queries: {teacher.architecture} has a norm over all query heads, behind which merged queries are "
            "not those of the merged weights; set prune.head_merge=none or outputs"
        )
    before, after = (shape.num_attention_heads // shape.num_query_groups for shape in (teacher, student))
    if after > before:
        raise UserError(
            f"student.num_attention_heads={student.num_attention_heads}: {after} heads in each of "
            f"{student.num_query_groups} KV groups, the teacher's have {before}; "
            f"choose at most {before * student.num_query_groups}"
        )
    if prune.head_merge is not Merge.none and 2 * after < before:
        raise UserError(
            f"prune.head_merge={prune.head_merge.value}: a kept head can take over one dropped head, so at least half of "
            f"the {before} heads of a KV group must stay; raise student.num_attention_heads or set prune.head_merge=none"
        )
    if prune.drop_layers is not None:
        dropped = set(prune.drop_layers)
        if len(dropped) != teacher.num_layers - student.num_layers or not dropped <= set(range(teacher.num_layers)):
            raise UserError(
                f"prune.drop_layers={prune.drop_layers}: student.num_layers={student.num_layers} of {teacher.num_layers} "
                f"needs {teacher.num_layers - student.num_layers} different layers of 0 … {teacher.num_layers - 1}; "
                "change one of them"
            )
    for key in ("hidden_size", "ffn_hidden_size", "moe_shared_expert_intermediate_size", "dense_ffn_hidden_size"):
        value = getattr(student, key)
        if value != getattr(teacher, key) and value % prune.multiple_of:
            raise UserError(
                f"student.{key}={value}: must be a multiple of prune.multiple_of={prune.multiple_of}; "
                f"choose {value // prune.multiple_of * prune.multiple_of or prune.multiple_of}"
            )


def check_enough(num_tokens: int, student: Shape, prune: PruneConfig) -> None:
    """Reject a least-squares fit on too few tokens, which would fit noise. `num_tokens` has no held-out tokens."""
    least = least_tokens(student)
    if prune.refit is not Refit.none and num_tokens < least:
        raise UserError(
            f"calibration: {num_tokens} tokens are too few to fit {least // TOKENS_PER_INPUT} inputs by least squares, "
            f"at least {least} are needed; raise calibration.num_samples and prune.repair_tokens, "
            f"lower prune.held_out_fraction={prune.held_out_fraction}, or set prune.refit=none"
        )


def num_repair_sequences(prune: PruneConfig, seq_length: int) -> int:
    """Largest number of sequences that rotation and repair are fitted on, the same on any number of processes.

    The processes hold them all together. A repair's two residual streams take 4 (D + H) repair_tokens bytes (D, H: hidden
    sizes of teacher and student). A rotation's stream takes 4 D repair_tokens bytes.
    """
    return max(1, prune.repair_tokens // seq_length)


def num_held_out(prune: PruneConfig, num_sequences: int) -> int:
    """Number of a repair's sequences to which no linear is fitted."""
    return int(prune.held_out_fraction * num_sequences)
