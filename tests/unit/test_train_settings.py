"""A run goes on under the settings that decide its result; the others may change."""

from dataclasses import asdict, fields
from typing import Any

import pytest

from minitron_train.arch.layer_kind import LayerKind, Rope
from minitron_train.config import Config, LossKind, OnNonFinite, Precision, Recompute
from minitron_train.runtime.errors import UserError
from minitron_train.stages import plain
from minitron_train.train.settings import NEUTRAL, check_settings, current_record, deciding_settings


def with_setting(key: str, value: Any) -> Config:
    """The default configuration with one other value."""
    config, (section, name) = Config(), key.split(".")
    assert getattr(getattr(config, section), name) != value, key
    setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("distill.logit_memory_fraction", 0.1), ("distill.vocab_tile", 64), ("distill.token_chunk", 64)],
        *[("train.micro_batch_size", 1), ("train.recompute", Recompute.full), ("train.log_every_steps", 7)],
        *[("train.on_non_finite", OnNonFinite.skip), ("train.early_stop_evaluations", 2)],
        *[("checkpoint.asynchronous", False), ("checkpoint.keep", 9), ("checkpoint.best_metric", "validation.loss")],
        *[("eval.every_tokens", 1000), ("eval.training_tasks", ["mmlu"]), ("data.num_workers", 4)],
        *[("parallel.tensor_model_parallel_size", 2), ("tracking.wandb", None)],
    ],
)
def test_neutral(key: str, value: Any) -> None:
    assert deciding_settings(with_setting(key, value), distilled=True) == deciding_settings(Config(), distilled=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("distill.loss", LossKind.jsd), ("distill.jsd_beta", 0.1), ("distill.teacher_precision", Precision.bf16)],
        *[("train.lr", 1.0), ("train.num_tokens", 7), ("train.seq_length", 7), ("train.precision", Precision.bf16)],
        *[("data.document_attention", True), ("data.late_fraction", 0.1)],
    ],
)
def test_deciding(key: str, value: Any) -> None:
    assert deciding_settings(with_setting(key, value), distilled=True) != deciding_settings(Config(), distilled=True)


def test_tasks_during_training_are_refused_where_experts_are_split() -> None:
    config = with_setting("eval.training_tasks", ["hellaswag"])
    check_settings(config, distilled=True)
    config.parallel.expert_model_parallel_size = 2
    with pytest.raises(UserError, match=r"eval\.training_tasks: cannot run with parallel.expert_model_parallel_size"):
        check_settings(config, distilled=True)


def test_every_neutral_setting_exists() -> None:
    for section, names in NEUTRAL.items():
        assert names < {f.name for f in fields(getattr(Config(), section))}, section
    assert "distill" not in deciding_settings(Config(), distilled=False)


OLD: list[tuple[dict[str, Any], LayerKind]] = [
    ({"rotary_base": 5e5, "rotary_percent": 0.5, "window": None}, LayerKind(rope=Rope(theta=5e5, percent=0.5))),
    ({"rotary_base": 1e4, "window": 4096, "rope_scaling_factor": None}, LayerKind(window=4096)),
    (
        {"rope_scaling_factor": 6.0, "rope_original_length": 16},
        LayerKind(rope=Rope(kind="llama3", factor=6.0, original_length=16)),
    ),
]


@pytest.mark.parametrize(("old", "kind"), OLD)
def test_records_of_earlier_shapes_are_todays(old: dict[str, Any], kind: LayerKind) -> None:
    record = {"train.lr": 1.0, "student.hidden_size": 64, **{f"student.{key}": value for key, value in old.items()}}
    wanted = {"student.kinds": plain([asdict(kind)]), "student.kind_of_layer": []}
    assert current_record(record) == {"train.lr": 1.0, "student.hidden_size": 64} | wanted
    assert current_record(current_record(record)) == current_record(record)
    del wanted["student.kinds"][0]["is_dense"]
    assert current_record(record | wanted) == current_record(record)
