"""Which settings decide what a training run learns: it is gone on with under the same ones, whatever else has changed."""

from dataclasses import fields
from typing import Any

from minitron_train.config import Config
from minitron_train.stages import plain

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
    "distill": {"memory_budget_u", "vocab_tile", "token_chunk"},
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
