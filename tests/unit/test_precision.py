"""precision=auto: the machine's choice, agreed by all ranks, and kept by what an earlier machine began."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import minitron_train as mt
from minitron_train.commands.training import recorded_precision, with_precision
from minitron_train.config import ClusterConfig, Config, Precision
from minitron_train.planning import precision
from minitron_train.planning.hardware import gemm_flops
from minitron_train.runtime.errors import UserError
from minitron_train.stages import Stage, read_started_record
from minitron_train.stages.stage import refuse_foreign
from minitron_train.train.settings import deciding_settings
from tests.support.training import Material

FAST = {
    "tracking.wandb.mode": "disabled",
    "data.num_workers": 0,
    "data.validation_tokens": 512,
    "calibration.num_samples": 16,
    "calibration.seq_length": 64,
    "prune": "paper",
    "train.seq_length": 32,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 4,
    "train.warmup_steps": 2,
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what this CPU's measurement finds."""
    monkeypatch.delenv(precision.VARIABLE)

    def find(gain: float) -> None:
        precision.fastest_on_cpu.cache_clear()
        monkeypatch.setattr(precision, "bf16_gain", lambda: gain)

    yield find
    precision.fastest_on_cpu.cache_clear()


@pytest.mark.parametrize(("gain", "expected"), [(0.2, "fp32"), (1.29, "fp32"), (1.31, "bf16"), (9.0, "bf16")])
def test_a_cpu_takes_bf16_where_it_multiplies_it_faster(measured: Any, gain: float, expected: str) -> None:
    measured(gain)
    assert precision.settled(Precision.auto, cuda=False) == expected
    assert precision.settled(Precision.fp32, cuda=False) == Precision.fp32, "a given precision is not measured"


def test_the_measurement_is_a_ratio() -> None:
    assert 0 < precision.bf16_gain() < 1000


def test_the_choice_is_logged_once(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measured(4.25)
    precision.announce.cache_clear()
    for _ in range(2):
        precision.settled(Precision.auto, cuda=False)
    assert capsys.readouterr().out == "precision auto: bf16, which this CPU multiplies 4.2 times as fast as fp32\n"


def test_a_wrong_variable_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(precision.VARIABLE, "fp8")
    with pytest.raises(UserError, match=r"MINITRON_AUTO_PRECISION=fp8: must be fp32 or bf16; correct it"):
        precision.settled(Precision.auto, cuda=False)


def test_all_ranks_take_the_first_ones_choice(measured: Any) -> None:
    measured(0.5)
    groups: Any = SimpleNamespace(device=torch.device("cpu"), on_rank0=lambda work: Precision.bf16)
    assert precision.agreed(Precision.auto, groups) is Precision.bf16
    assert precision.agreed(Precision.fp32, groups) is Precision.fp32


def test_estimates_know_the_choice(measured: Any) -> None:
    measured(2.0)
    asked = Config()
    asked.eval.precision = Precision.fp32
    asked.distill.teacher_precision = Precision.auto
    found = precision.concrete(asked)
    assert found.distill.teacher_precision == "bf16"
    sections = (found.train, found.calibration, found.eval)
    assert [section.precision for section in sections] == ["bf16", "bf16", "fp32"]
    assert asked.train.precision is Precision.auto, "the configuration itself is unchanged"


def test_the_rate_of_a_cpu_is_measured_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[torch.dtype] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (multiplied.append(a.dtype), real(a, b, out=out)))
    for wanted in (Precision.fp32, Precision.bf16):
        gemm_flops(wanted, cuda=False, repeats=1)
    assert set(multiplied[:2]) == {torch.float32} and set(multiplied[2:]) == {torch.bfloat16}


def test_a_described_cluster_trains_in_bf16(measured: Any) -> None:
    from minitron_train.arch import Shape
    from minitron_train.planning import make_plan
    from tests.unit.test_plan import load, shapes

    measured(0.5)
    config = load("+recipe=4b", "train.precision=auto", "calibration.precision=auto", "distill.teacher_precision=auto")
    assert isinstance(config.cluster, ClusterConfig) and config.cluster.peak_tflops
    teacher, student = shapes(config)
    assert isinstance(teacher, Shape)
    fixed = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, precision=Precision.bf16),
        distill=dataclasses.replace(config.distill, teacher_precision=Precision.bf16),
    )
    assert make_plan(config, teacher, student) == make_plan(fixed, teacher, student)


def test_what_one_machine_began_another_continues(
    training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores stay finished, and a training keeps the precision that it began with."""

    def run(choice: str, num_tokens: int) -> mt.Distilled:
        monkeypatch.setenv(precision.VARIABLE, choice)
        mt.prune(training.teacher, "out", hidden_size=48, text=training.corpus, settings=FAST)
        return mt.distill(
            training.teacher, "out/pruned", "out", text=training.corpus, num_tokens=num_tokens, settings=FAST
        )

    monkeypatch.chdir(tmp_path)
    run("bf16", 512)
    records = {name: json.loads((Path("out") / name / "provenance.json").read_text()) for name in ("scores", "train")}
    assert records["scores"]["facts"]["dtype"] == "bfloat16"
    assert records["scores"]["settings"]["calibration"]["precision"] is None
    assert records["train"]["facts"]["precision"] == records["train"]["settings"]["train"]["precision"] == "bf16"
    assert recorded_precision(Path("out/train")) is Precision.bf16
    capsys.readouterr()
    run("fp32", 512)
    said = capsys.readouterr().out
    assert all(f"{stage}: already finished" in said for stage in ("score", "prune", "distill"))
    (Path("out/train") / "provenance.json").unlink()  # as if it had been stopped: started.json tells
    Path("out/train/started.json").write_text(json.dumps(records["train"]))
    assert recorded_precision(Path("out/train")) is Precision.bf16
    with pytest.raises(UserError, match=r"precision was bf16, is fp32"):
        settings = FAST | {"train.precision": "fp32"}
        mt.distill(training.teacher, "out/pruned", "out", text=training.corpus, num_tokens=512, settings=settings)


@pytest.mark.parametrize("content", ["{", "{}", '{"inputs": {}, "settings": {"train": {"precision": "fp8"}}}'])
def test_a_damaged_record_tells_no_precision(tmp_path: Path, content: str) -> None:
    (tmp_path / "started.json").write_text(content)
    assert recorded_precision(tmp_path) is None


def test_the_remedy_for_a_damaged_record_helps(tmp_path: Path) -> None:
    """Without started.json the folder is no longer known as a training's: removing the file is no remedy."""
    (tmp_path / "started.json").write_text("{")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"restore it from a copy, or start again with force=true$"):
        read_started_record(tmp_path)
    stage = Stage(name="distill", folder=tmp_path, inputs={}, settings={}, mode="resumable")
    refuse_foreign(stage)
    (tmp_path / "started.json").unlink()
    with pytest.raises(UserError, match="did not write"):
        refuse_foreign(stage)


def began(folder: Path, precision: str, teacher: str | None = None, slurm_job: str | None = None) -> None:
    """The record of a training that began, and was killed before it finished."""
    folder.mkdir(parents=True)
    settings = {"train": {"precision": precision}, "distill": {"teacher_precision": teacher}}
    record = {"inputs": {}, "settings": settings, "slurm_job": slurm_job}
    (folder / "started.json").write_text(json.dumps(record))


def resumed(folder: Path, *, force: bool = False) -> list[Any]:
    """What a start with both precisions auto takes for student and teacher."""
    config = Config(force=force)
    config.distill.teacher_precision = Precision.auto
    settings = deciding_settings(config, distilled=True)
    stage = Stage(name="distill", folder=folder, inputs={}, settings=settings, mode="resumable")
    found = with_precision(cast(Any, SimpleNamespace(on_rank0=lambda work: work())), config, stage)
    return [found.train.precision, found.distill.teacher_precision]


def test_the_teacher_keeps_its_precision_too(measured: Any, tmp_path: Path) -> None:
    measured(0.5)
    assert resumed(tmp_path / "train") == ["fp32", "fp32"]
    began(tmp_path / "train", "fp32", "bf16")
    assert resumed(tmp_path / "train") == ["fp32", "bf16"]
    assert resumed(tmp_path / "train", force=True) == ["fp32", "fp32"]


def test_a_requeued_job_keeps_what_it_forced(measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(0.5)
    began(tmp_path / "train", "bf16", "bf16", slurm_job="7")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert resumed(tmp_path / "train", force=True) == ["bf16", "bf16"]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert resumed(tmp_path / "train", force=True) == ["fp32", "fp32"]


def test_a_restored_training_keeps_its_precision(measured: Any, tmp_path: Path) -> None:
    """A run with force=true was killed before its first checkpoint: the one that it was to replace is resumed."""
    measured(0.5)
    began(tmp_path / "train", "fp32", "fp32")
    began(tmp_path / "train.replaced", "bf16", "bf16")
    assert resumed(tmp_path / "train") == ["bf16", "bf16"]
