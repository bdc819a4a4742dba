"""Which settings of a training run contradict each other, and which decide its result. The module does not load torch.

A run can be resumed as long as its deciding settings are unchanged.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from minitron_train.arch import Shape
from minitron_train.arch.layer_kind import OLD_FIELDS, kind_of_record
from minitron_train.config import Config, Recompute
from minitron_train.runtime.errors import UserError
from minitron_train.stages import plain
from minitron_train.train.best import BestMetric

NEUTRAL = {  # section -> settings that may change between restarts; all other settings of these sections decide
    "train": {
        "micro_batch_size",  # the first four change results only by rounding, as another number of ranks does
        "recompute",
        "transformer_engine",
        "distributed_optimizer",
        "on_non_finite",  # the remedy for a run that stopped at a NaN
        "early_stop_evaluations",
        "log_every_steps",
        "profile_steps",
        "straggler_every_steps",
    },
    "distill": {"logit_memory_fraction", "vocab_tile", "token_chunk", "compile_loss"},  # these too
}
# settings of later versions, recorded only where they differ from these values
ADDED = {"distill": {"teacher_fp8": False}}
DATA = ("document_attention", "late_fraction")  # deciding settings that the data fingerprint does not cover


def deciding_settings(config: Config, *, distilled: bool) -> dict[str, Any]:
    """Return the seed and the deciding settings by section, as JSON values. `distill` is included only with a teacher.

    The other sections (checkpoint, tracking, eval, parallel) do not decide what a run learns.
    """
    found: dict[str, Any] = {"seed": config.seed, "data": {name: getattr(config.data, name) for name in DATA}}
    for section, neutral in NEUTRAL.items() if distilled else [("train", NEUTRAL["train"])]:
        values = getattr(config, section)
        own = {f.name: plain(getattr(values, f.name)) for f in fields(values) if f.name not in neutral}
        added = ADDED.get(section, {})
        found[section] = {name: value for name, value in own.items() if name not in added or value != added[name]}
    return found


KIND_DEFAULTS = {"is_dense": False}  # fields of LayerKind that records of earlier versions lack
SHAPE_DEFAULTS = {field.name: field.default for field in fields(Shape) if field.default is not MISSING}


def current_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint, with the fields of a model's shape that replace those of earlier versions."""
    found = dict(record)
    for label in ("student", "teacher"):
        old = {name: found.pop(f"{label}.{name}") for name in OLD_FIELDS if f"{label}.{name}" in found}
        if old:
            found |= {f"{label}.kinds": [plain(asdict(kind_of_record(old)))], f"{label}.kind_of_layer": []}
        if f"{label}.kinds" in found:
            found[f"{label}.kinds"] = [KIND_DEFAULTS | kind for kind in found[f"{label}.kinds"]]
        if f"{label}.architecture" in found:
            found = {f"{label}.{name}": value for name, value in SHAPE_DEFAULTS.items()} | found
    return found


def check_settings(config: Config, *, distilled: bool) -> None:
    """Reject settings that contradict each other for any model and any machine.

    Raises:
        UserError: names the setting and the remedy.
    """
    train, tp = config.train, config.parallel.tensor_model_parallel_size
    if (train.warmup_steps or 0) > train.num_steps:
        raise UserError(
            f"train.warmup_steps={train.warmup_steps}: longer than the run of {train.num_steps} steps; lower it, or raise "
            "train.num_tokens"
        )
    if train.transformer_engine and (
        config.data.document_attention or config.data.has_chat or config.eval.training_tasks
    ):
        raise UserError(
            "train.transformer_engine=true: its attention supports only a causal mask, but data.document_attention, "
            "conversations (kind=chat) and eval.training_tasks need another one; remove one of these settings"
        )
    if distilled and config.distill.teacher_fp8 and not train.transformer_engine:
        raise UserError(
            "distill.teacher_fp8=true: only Transformer Engine's layers multiply in FP8, and they need CUDA; set "
            "train.transformer_engine=true, or remove it"
        )
    if train.early_stop_evaluations and not config.eval.every_tokens:
        raise UserError(
            f"train.early_stop_evaluations={train.early_stop_evaluations}: without eval.every_tokens the only evaluation is "
            "at the end; set eval.every_tokens"
        )
    if distilled and config.distill.hidden_layers and train.recompute is Recompute.full:
        raise UserError(
            "train.recompute=full: does not keep the hidden states that distill.hidden_layers needs; choose selective or none"
        )
    if config.parallel.sequence_parallel and train.seq_length % tp:
        raise UserError(
            f"train.seq_length={train.seq_length}: must be a multiple of parallel.tensor_model_parallel_size="
            f"{tp} with parallel.sequence_parallel; change one of these settings"
        )
    if config.eval.training_tasks and config.parallel.expert_model_parallel_size > 1:
        raise UserError(
            "eval.training_tasks: cannot run with parallel.expert_model_parallel_size above 1, because each forward pass "
            "takes all ranks of an expert group, and these get different requests; remove the tasks, and run eval afterwards"
        )
    BestMetric.of(config, distilled=distilled)
    if config.parallel.pipeline_model_parallel_size > 1:
        check_stages(config)


def check_ranks(config: Config, num_ranks: int) -> None:
    """Reject parallel sizes that do not divide the ranks, and a batch that the data-parallel ranks cannot share.

    Raises:
        UserError: names the setting and the remedy.
    """
    train, parallel = config.train, config.parallel
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if num_ranks % tp:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp}: must divide the number of processes, {num_ranks}; "
            f"start a multiple of {tp}, or lower it"
        )
    if num_ranks % (tp * stages):
        raise UserError(
            f"parallel.pipeline_model_parallel_size={stages}: with tensor_model_parallel_size={tp} it must divide "
            f"the number of processes, {num_ranks}; start a multiple of {stages * tp}, or lower it"
        )
    replicas, ep = num_ranks // (tp * stages), parallel.expert_model_parallel_size
    if replicas % ep:
        raise UserError(
            f"parallel.expert_model_parallel_size={ep}: must divide the number of data-parallel ranks, {replicas}; choose a "
            f"divisor, or start a multiple of {tp * stages * ep} processes"
        )
    if train.global_batch_size % (train.micro_batch_size * replicas):
        raise UserError(
            f"train.global_batch_size={train.global_batch_size}: must be a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {replicas} data-parallel ranks; change one of these settings"
        )


def check_stages(config: Config) -> None:
    """Reject settings that need a whole model on one rank, which a training with pipeline stages does not have.

    Raises:
        UserError: names the setting and the remedy.
    """
    train, stages = config.train, config.parallel.pipeline_model_parallel_size
    where = f"parallel.pipeline_model_parallel_size={stages}"
    if config.eval.training_tasks:
        raise UserError(
            f"eval.training_tasks: {where} leaves no rank with a whole model; remove the tasks and run eval after export"
        )
    if train.router_aux_loss and train.recompute is not Recompute.none:
        raise UserError(
            f"train.recompute={train.recompute.name}: with {where}, recomputed experts would take the load-balancing loss of "
            "another micro-batch; set train.recompute=none, or remove train.router_aux_loss"
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to one level with dotted keys, such as `train.lr`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
