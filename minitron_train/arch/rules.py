"""Rules of the programs that load an exported folder, and of Transformer Engine, checked before any work is done."""

from minitron_train.arch import Shape, architecture
from minitron_train.arch.wrappers import WRAPPERS
from minitron_train.runtime.errors import UserError


def check_rules(shape: Shape, where: str) -> None:
    """Reject a shape that transformers' own config class would reject."""
    for rule in architecture(shape.architecture).rules:
        broken = rule(shape)
        if broken:
            raise UserError(
                f"{where}: {broken} (a rule of transformers' {shape.architecture} config); change the target"
            )


def check_wrapper(teacher: Shape, student: Shape) -> None:
    """Reject sizes that the vision model around a text model would have to follow."""
    if teacher.wrapper is None:
        return
    reason = WRAPPERS[teacher.wrapper].hidden_size
    if reason is not None and student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"student.hidden_size={student.hidden_size}: cannot be cut inside {teacher.wrapper}, because {reason}; "
            f"keep {teacher.hidden_size}"
        )
    if student.num_layers < teacher.num_bound_layers:
        raise UserError(
            f"student.num_layers={student.num_layers}: {teacher.wrapper} adds image features to the first "
            f"{teacher.num_bound_layers} layers; keep at least {teacher.num_bound_layers}"
        )


def check_transformer_engine(shape: Shape, name: str, seq_length: int) -> None:
    """Reject a model that Transformer Engine's layers would not reproduce; `name` ("student", …) goes into the message."""
    if reason := beyond_transformer_engine(shape, seq_length):
        raise UserError(f"train.transformer_engine=true: the {name} has {reason}; remove it")


def check_fp8(teacher: Shape, tp: int, num_tokens: int) -> None:
    """Reject sizes of the teacher that Transformer Engine's FP8 products do not take: all must be multiples of 16.

    Args:
        num_tokens: tokens of a micro-batch.
    """
    sizes = {
        "tokens of a micro-batch": num_tokens,
        "hidden_size": teacher.hidden_size,
        "ffn_hidden_size / TP": teacher.ffn_hidden_size // tp,
        "query channels / TP": teacher.axis_size("q") // tp,
        "key channels / TP": teacher.axis_size("kv") // tp,
    }
    for name, size in sizes.items():
        if size % 16:
            raise UserError(f"distill.teacher_fp8=true: the teacher's {name} is {size}, no multiple of 16; remove it")


def beyond_transformer_engine(shape: Shape, seq_length: int) -> str | None:
    """What of this model Transformer Engine's layers do not compute, or None."""
    table = architecture(shape.architecture)
    if not shape.is_plain(seq_length):
        return "attention windows below train.seq_length, or layers with another rotary embedding or none"
    if table.has_experts:
        return "experts, which run in this program's own layers only"
    if shape.attention_softcap is not None:
        return "a soft cap on attention scores, and its kernels have none"
    if table.has_projection_norms:
        return "norms over all query heads together, and its layers normalise each head"
    has_bias = dict.fromkeys(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), False)
    for row in table.layer_rows(shape, shape.kinds[0]):
        *_, linear, kind = row.mcore.split(".")
        if kind == "bias" and linear in has_bias:
            has_bias[linear] = True
    rest = set(list(has_bias.values())[1:])
    if len(rest) > 1 or (rest == {True} and not has_bias["linear_qkv"]):
        return "biases on some linears, and its layers have them on all linears or on query, key and value"
    return None
