"""Which settings of a training run contradict each other, and which decide what it learns; torch is not loaded.

A run is gone on with under the same deciding settings, whatever else has changed.
"""

from dataclasses import fields
from typing import Any

from minitron_train.config import Config, Recompute
from minitron_train.runtime.errors import UserError
from minitron_train.stages.run import plain
from minitron_train.train.best import BestMetric

NEUTRAL = {  # sections of a run and those of their settings that may change between restarts; the others decide
    "train": {
        "micro_batch_size",  # these move results by rounding alone, as another number of ranks does
        "recompute",
        "transformer_engine",
        "distributed_optimizer",
        "on_non_finite",  # the remedy for a run that has stopped
        "early_stop_evaluations",
        "log_every_steps",
    },
    "distill": {"logit_memory_fraction", "vocab_tile", "token_chunk"},
}
DATA = ("document_attention", "late_fraction")  # what the fingerprint of the stream's sources does not cover


def deciding_settings(config: Config, *, distilled: bool) -> dict[str, Any]:
    """Seed and deciding settings by section, JSON-able; those of `distill` only where there is a teacher.

    Where and how a run is saved, logged, evaluated and spread over processes is in other sections, and decides nothing.
    """
    found: dict[str, Any] = {"seed": config.seed, "data": {name: getattr(config.data, name) for name in DATA}}
    for section, neutral in NEUTRAL.items() if distilled else [("train", NEUTRAL["train"])]:
        values = getattr(config, section)
        found[section] = {f.name: plain(getattr(values, f.name)) for f in fields(values) if f.name not in neutral}
    return found


def check_settings(config: Config, *, distilled: bool) -> None:
    """Refuse settings of a run that no model and no machine makes right.

    Raises:
        UserError: which, and the remedy.
    """
    train, tp = config.train, config.parallel.tensor_model_parallel_size
    if train.warmup_steps > train.num_steps:
        raise UserError(
            f"train.warmup_steps={train.warmup_steps}: longer than the run of {train.num_steps} steps; lower it or train on more"
        )
    if train.transformer_engine and (config.data.document_attention or config.eval.training_tasks):
        raise UserError(
            "train.transformer_engine=true: its causal attention takes no further mask, which data.document_attention and "
            "eval.training_tasks need; leave one of them out"
        )
    if train.early_stop_evaluations and not config.eval.every_tokens:
        raise UserError(
            f"train.early_stop_evaluations={train.early_stop_evaluations}: there is one evaluation, at the end; "
            "set eval.every_tokens"
        )
    if distilled and config.distill.hidden_layers and train.recompute is Recompute.full:
        raise UserError(
            "train.recompute=full: hidden states of layers (distill.hidden_layers) are not kept then; choose selective or none"
        )
    if config.parallel.sequence_parallel and train.seq_length % tp:
        raise UserError(
            f"train.seq_length={train.seq_length}: must be a multiple of parallel.tensor_model_parallel_size="
            f"{tp} with parallel.sequence_parallel; change one of them"
        )
    BestMetric.of(config, distilled=distilled)
