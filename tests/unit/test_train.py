"""The training loop on one process: schedule, accumulation, recomputation, faults in the numbers, validation, metrics."""

import gzip
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.commands.command import execute
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import (
    ClusterConfig,
    LossKind,
    OnNonFinite,
    Precision,
    Recompute,
    Schedule,
    SourceConfig,
    TrainConfig,
)
from minitron_train.data.prefetch import PrefetchingStream
from minitron_train.data.stream import Batch
from minitron_train.planning.hardware import data_sheet_flops
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.train.checkpoint_files import finished
from minitron_train.train.metrics import MetricsFile, ThroughputMeter, read_rows
from minitron_train.train.optim import learning_rate
from minitron_train.train.state import RunState
from tests.support.training import NUM_STEPS, ROWS, SEQ_LENGTH, Material, before_step, make_config, rows, run

STEP_TOKENS = ROWS * SEQ_LENGTH


@pytest.fixture(scope="module")
def plain(training: Material, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("plain")
    run(training, folder)
    return rows(folder)


def test_learning_rate() -> None:
    train = TrainConfig(num_tokens=100, global_batch_size=1, seq_length=10, lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(train, 10 * step) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[9] == pytest.approx(0.1)
    train.schedule = Schedule.linear
    assert learning_rate(train, 60) == pytest.approx(0.55)
    train.schedule = Schedule.constant
    assert learning_rate(train, 90) == 1.0
    train.warmup_steps = 0
    assert learning_rate(train, 0) == 1.0


def test_student_learns_from_the_teacher(plain: list[dict]) -> None:
    assert [row["step"] for row in plain] == list(range(1, NUM_STEPS + 1))
    assert plain[-1]["tokens"] == NUM_STEPS * STEP_TOKENS
    assert plain[-1]["kd_loss"] < 0.9 * plain[0]["kd_loss"]
    assert plain[0]["loss"] == plain[0]["kd_loss"]
    assert plain[0]["ce_loss"] is None
    assert plain[-1]["source.own"] == 1.0
    assert {"eval.validation.kl", "eval.validation.loss", "eval.validation.perplexity"} <= set(plain[-1])


def test_pretrain_uses_labels_alone(training: Material, tmp_path: Path) -> None:
    run(training, tmp_path, alone=True)
    first, last = rows(tmp_path)[0], rows(tmp_path)[-1]
    assert first["kd_loss"] is None
    assert first["loss"] == pytest.approx(math.log(320), abs=0.5)
    assert last["loss"] < first["loss"]
    assert "eval.validation.kl" not in last


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ({"train__micro_batch_size": 8}, 1e-6),
        ({"train__recompute": Recompute.full}, 0.0),
        ({"train__recompute": Recompute.selective}, 0.0),
        ({"eval__every_tokens": STEP_TOKENS}, 0.0),  # validation changes nothing
        ({"checkpoint__asynchronous": False, "checkpoint__interval_steps": 1}, 0.0),
        ({"train__precision": Precision.bf16}, 0.03),
    ],
    ids=str,
)
def test_same_losses_with(
    training: Material, plain: list[dict], tmp_path: Path, setting: dict, tolerance: float
) -> None:
    run(training, tmp_path, **setting)
    for row, wanted in zip(rows(tmp_path), plain, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert row[key] == pytest.approx(wanted[key], rel=tolerance, abs=0), (row["step"], key)


def test_documents_do_not_see_each_other(training: Material, plain: list[dict], tmp_path: Path) -> None:
    run(training, tmp_path, data__document_attention=True)
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))


def test_hidden_states_count_as_much_as_logits(training: Material, plain: list[dict], tmp_path: Path) -> None:
    run(training, tmp_path, distill__hidden_layers=["embedding/embedding", "1/2"])
    found = rows(tmp_path)
    first, second = found[:2]
    assert first["kd_loss"] == plain[0]["kd_loss"]
    assert first["hidden_weight"] == pytest.approx(first["kd_loss"] / first["hidden_loss"])
    assert first["loss"] == pytest.approx(2 * first["kd_loss"])
    assert second["hidden_weight"] == pytest.approx(first["kd_loss"] / first["hidden_loss"])
    assert found[-1]["hidden_loss"] < first["hidden_loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"distill__hidden_layers": ["0/7"]},
            "distill.hidden_layers=0/7: the teacher has no layer 7; its last one is 2",
        ),
        ({"distill__loss": LossKind.top_k_kl, "distill__top_k": 321}, "top_k=321: the vocabulary has 320 entries"),
    ],
    ids=["layer", "top_k"],
)
def test_what_the_shapes_tell_is_refused_before_weights_are_read(
    training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str
) -> None:
    monkeypatch.delattr("minitron_train.train.assemble.load_model")
    with pytest.raises(UserError, match=message):
        run(training, tmp_path, **settings)


def test_a_teacher_that_nobody_reads_does_not_run(training: Material, tmp_path: Path) -> None:
    from minitron_train.model.build import LanguageModel

    def forward_passes(name: str, **overrides: Any) -> int:
        passes: list[torch.nn.Module] = []

        def see(module: torch.nn.Module, *_: object) -> None:
            if isinstance(module, LanguageModel):
                passes.append(module)

        handle = torch.nn.modules.module.register_module_forward_hook(see)
        try:
            run(training, tmp_path / name, **overrides)
        finally:
            handle.remove()
        return len(passes)

    micro_batches = NUM_STEPS * ROWS // 2
    both = forward_passes("both", distill__ce_weight=1.0)
    assert both - forward_passes("labels", distill__kd_weight=0.0, distill__ce_weight=1.0) == micro_batches


def poison(trainer) -> None:
    """One gradient is not a number."""
    next(iter(trainer.student.parameters())).main_grad.view(-1)[3] = math.nan


def test_a_nan_stops_before_the_step(training: Material, tmp_path: Path) -> None:
    kept = {}

    def keep(trainer) -> None:
        kept["before"] = {name: value.clone() for name, value in trainer.student.named_parameters()}
        kept["student"] = trainer.student
        poison(trainer)

    with (
        before_step(5, keep),
        pytest.raises(UserError, match=r"step 5: .*sequences 32 to 39 .*train.on_non_finite=skip"),
    ):
        run(training, tmp_path)
    for name, value in kept["student"].named_parameters():
        assert torch.equal(value, kept["before"][name]), name


def test_a_nan_loses_no_checkpoint(training: Material, tmp_path: Path) -> None:
    with before_step(4, poison), pytest.raises(UserError, match="step 4"):
        run(training, tmp_path)  # step 3 is on its way to disk
    assert [path.name for path in finished(tmp_path / "checkpoints")] == ["step_00000003"]


def test_a_nan_can_be_skipped(training: Material, plain: list[dict], tmp_path: Path) -> None:
    with before_step(3, poison):
        facts = run(training, tmp_path, train__on_non_finite=OnNonFinite.skip)
    found = rows(tmp_path)
    assert facts["num_skipped"] == 1
    assert found[2]["grad_norm"] is None
    assert [row["loss"] for row in found[:3]] == [row["loss"] for row in plain[:3]]
    assert found[-1]["loss"] < plain[0]["loss"]


def test_batches_that_do_not_fit(training: Material, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.global_batch_size=8: must be a multiple of train.micro_batch_size=3"):
        run(training, tmp_path, train__micro_batch_size=3)


@pytest.mark.parametrize("other", [{"data__document_attention": True}, {"eval__training_tasks": ["hellaswag"]}])
def test_masks_that_transformer_engine_would_not_see(training: Material, tmp_path: Path, other: dict) -> None:
    with pytest.raises(UserError, match=r"train.transformer_engine=true: .* supports only a causal mask"):
        run(training, tmp_path, train__transformer_engine=True, **other)


def test_metrics_file_holds_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 5):
        file.write({"step": step, "loss": math.nan})
    file.close()
    with path.open("a") as handle:
        handle.write('{"step": 5, "lo')  # a kill in the middle of a line
    file = MetricsFile(path, 2)
    file.write({"step": 3, "loss": 1.0})
    file.close()
    assert read_rows(path).values == [{"step": 1, "loss": None}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]


def test_speed_counts_training_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 12.0])
    monkeypatch.setattr("minitron_train.train.metrics.time.perf_counter", lambda: next(clock))
    speed = ThroughputMeter(flops_per_token=10.0, gemm_flops_per_second=100.0, num_devices=2)
    speed.count(8)
    speed.resume()  # validation took from 2 to 10
    speed.count(8)
    assert speed.read() == {"tokens_per_second": 4.0, "gemm_utilisation": pytest.approx(4.0 * 10 / 200)}


def test_mfu_is_a_share_of_the_data_sheet_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    h100, own = "NVIDIA H100 80GB HBM3", ClusterConfig(peak_tflops=100)
    assert data_sheet_flops(h100, Precision.bf16, own) == 989e12
    assert data_sheet_flops("NVIDIA H100 PCIe", Precision.bf16, own) == 756e12
    assert data_sheet_flops("another GPU", Precision.bf16, own) == 100e12
    assert data_sheet_flops("another GPU", Precision.bf16, ClusterConfig()) is None
    assert data_sheet_flops(h100, Precision.fp32, own) is None
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("minitron_train.train.metrics.time.perf_counter", lambda: next(clock))
    speed = ThroughputMeter(10.0, gemm_flops_per_second=100.0, num_devices=2, data_sheet_flops_per_second=400.0)
    assert speed.read() == {"tokens_per_second": None, "gemm_utilisation": None, "mfu": None}
    speed.count(16)
    assert speed.read() == {
        "tokens_per_second": 8.0,
        "gemm_utilisation": pytest.approx(0.4),
        "mfu": pytest.approx(0.1),
    }


def test_a_resumed_run_reports_on_the_whole_run(
    training: Material, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Shares of the data count all steps; a row that the process before has put off has them, but no speed."""
    parts = {
        "a": SourceConfig(path=str(training.corpus), weight=7),
        "b": SourceConfig(path=str(training.corpus), weight=3),
    }
    settings = {"data__path": None, "data__sources": parts, "eval__every_tokens": STEP_TOKENS}
    run(training, tmp_path / "whole", **settings)
    with before_step(5, lambda _: os.kill(os.getpid(), signal.SIGUSR1)), pytest.raises(SystemExit):
        run(training, tmp_path / "resumed", **settings)
    capsys.readouterr()
    run(training, tmp_path / "resumed", **settings)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")
    assert rows(tmp_path / "whole")[-1]["source.a"] == pytest.approx(0.7, abs=0.01)
    said = [line for line in capsys.readouterr().out.splitlines() if "step 5/8, " in line]
    assert len(said) == 1 and "tokens/s" not in said[0] and "left" not in said[0]
    speeds = [row["tokens_per_second"] for row in read_rows(tmp_path / "resumed" / "metrics.jsonl").values]
    assert [step for step, speed in enumerate(speeds, 1) if speed is None] == [5]
    assert all(speed > 0 for speed in speeds if speed is not None)


def test_a_checkpoint_from_before_sources_were_counted() -> None:
    saved = RunState(step=3).state_dict()
    del saved["sources"]
    state = RunState()
    state.load_state_dict(saved)
    state.count(8, {"own": 1})
    assert (state.step, state.tokens, state.source_shares) == (4, 8, {"source.own": 1.0})


def test_a_mistake_with_force_costs_no_earlier_training(training: Material, tmp_path: Path) -> None:
    """What would refuse the new run is found before the old one makes way for it."""
    (tmp_path / "train" / "checkpoints" / "step_00000004").mkdir(parents=True)
    (tmp_path / "train" / "started.json").write_text("{}")
    config = make_config(training, teacher__path=str(training.teacher), student__path=str(training.student))
    config.output_dir, config.force, config.train.micro_batch_size = str(tmp_path), True, ROWS - 1
    with pytest.raises(UserError, match=r"^train\.global_batch_size=.*: must be a multiple of train\.micro_batch_size"):
        execute(COMMANDS["distill"], config, ["distill"], World())
    assert (tmp_path / "train" / "checkpoints" / "step_00000004").is_dir()


def test_some_steps_are_profiled(
    training: Material, plain: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace changes no figure."""
    run(training, tmp_path, train__profile_steps=[3, 4])
    assert rows(tmp_path) == plain
    (trace,) = tmp_path.glob("trace*")
    assert trace.name == "trace_steps_3_4.json.gz" and "open it at ui.perfetto.dev" in capsys.readouterr().out
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)


def test_waiting_for_the_stream_is_logged(training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next_batch = PrefetchingStream.next_batch

    def slow(self: PrefetchingStream, *arguments: Any) -> Batch:
        time.sleep(0.05)
        return next_batch(self, *arguments)

    monkeypatch.setattr(PrefetchingStream, "next_batch", slow)
    run(training, tmp_path, train__log_every_steps=2)
    waited = [row["data_seconds"] for row in read_rows(tmp_path / "metrics.jsonl").values]
    assert all(seconds >= 0.1 for seconds in waited), "two steps a line, each at least 0.05 s"
