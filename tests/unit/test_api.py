"""`import minitron_train as mt`: every block of docs/python.md runs, the import is light, mistakes are one line."""

import inspect
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import minitron_train as mt
from tests.support.training import Material

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
FAST = {
    "tracking.wandb.mode": "disabled",
    "data.num_workers": 0,
    "calibration.num_samples": 16,
    "calibration.seq_length": 64,
}


@pytest.fixture
def models(training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The names that the page uses, in the working directory."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "teacher").symlink_to(training.teacher)
    text = training.corpus.read_text()
    for name, part in (("corpus", text[:60000]), ("held_out", text[60000:70000])):
        lines = [json.dumps({"text": part[i : i + 2000]}) for i in range(0, len(part), 2000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_every_block_of_the_page_runs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron_train.api import functions as api

    configure = api.configure
    small = FAST | {"train.seq_length": 32, "train.global_batch_size": 8}
    small |= {"train.warmup_steps": 2, "data.validation_tokens": 512, "prune.refit": "none"}
    monkeypatch.setattr(api, "configure", lambda values: configure({**small, **values}))
    namespaces: list[dict[str, Any]] = [{"__name__": "page"} for _ in blocks()]
    for block, namespace in zip(blocks(), namespaces, strict=True):
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert (models / "outputs/half/report.html").exists()
    assert sorted(path.name for path in (models / "outputs/half/eval").glob("*.json")) != []
    timed = next(namespace["timed"] for namespace in namespaces if "timed" in namespace)
    assert list(timed.models) == ["teacher", "pruned", "student"]
    assert json.loads((models / "outputs/half/speed/speed.json").read_text())["models"] == timed.models
    trainer = next(namespace["trainer"] for namespace in namespaces if "trainer" in namespace)
    assert trainer.state.global_step == 10 and (models / "outputs/trainer/student/config.json").exists()


def test_every_function_has_a_section_that_calls_it() -> None:
    sections = {section.split("\n")[0]: section for section in PAGE.read_text().split("\n## ")}
    for name in (name for name in mt.__all__ if name[0].islower()):
        code = "".join(re.findall(r"^```python\n(.*?)^```", sections[f"mt.{name}"], re.M | re.S))
        signature = inspect.signature(getattr(mt, name))
        assert f"mt.{name}(" in code
        words = re.sub(r"\s+", " ", sections[f"mt.{name}"])
        shown = re.search(rf"`mt\.{name}\((.*?)\)`", words)
        assert (
            shown and inspect.signature(eval(f"lambda {shown[1]}: 0")).parameters.keys() == signature.parameters.keys()
        )


def test_importing_the_package_is_light() -> None:
    script = (
        "import sys, minitron_train as mt; heavy = {'torch', 'hydra', 'numpy', 'minitron_train.api'} & sys.modules.keys();"
        "assert not heavy, heavy; assert {'prune', 'distillation_loss', '__version__'} <= set(dir(mt));"
        "from minitron_train import UserError; assert mt.UserError is UserError; assert not hasattr(mt, 'prnue')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_is_one_of_the_api() -> None:
    from minitron_train.api import functions as api

    assert all(getattr(mt, name) is getattr(api, name) for name in mt.__all__)


def test_progress_can_be_silenced(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("minitron_train")
    logger.setLevel(logging.WARNING)
    try:
        mt.score("models/teacher", "quiet", text="corpus.jsonl", settings=FAST)
    finally:
        logger.setLevel(logging.INFO)
    assert capsys.readouterr().out == ""
    mt.score("models/teacher", "quiet", text="corpus.jsonl", settings=FAST)
    assert "score: already finished" in capsys.readouterr().out


def test_documents_may_be_given_themselves(models: Path) -> None:
    found = mt.score("models/teacher", "own", text=["alpha beta gamma " * 200] * 12, settings=FAST)
    assert found.num_sequences == 16 and found.num_tokens > 0


def test_the_loss_is_the_mean_over_valid_tokens() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 12)
    rows = torch.randn(40, 8, requires_grad=True), torch.randn(40, 12)
    mask = torch.arange(10).view(2, 5) % 3 > 0
    loss = mt.distillation_loss(student, rows[0], teacher, rows[1], mask=mask, temperature=2.0)
    log_p, log_q = ((x @ w.t() / 2.0).log_softmax(-1) for x, w in ((student, rows[0]), (teacher, rows[1])))
    expected = (log_q.exp() * (log_q - log_p)).sum(-1)[mask].mean()
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (student, rows[0]))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (student, rows[0])), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mt.prune("models/teacher", "x", settings={"prune.widht": "wanda"}), "unknown key 'prune.widht'"),
        (lambda: mt.prune("models/teacher", "x", settings={"prune": "papre"}), "unknown preset of prune 'papre'"),
        (lambda: mt.prune("models/teacher", "x", settings={"teacher.path": "y"}), "is an argument of the function too"),
        (lambda: mt.prune("models/teacher", "x", hidden_size=60000), "larger than the teacher's"),
        (lambda: mt.prune("models/absent", "x", hidden_size=8), "teacher.path=models/absent: no such folder"),
        (lambda: mt.score("models/teacher", "x", settings={"seed": "seven"}), "seed"),
        (lambda: mt.speed("x"), "nothing to measure in x"),
        (lambda: mt.speed("x", batch_sizes=[0]), "speed.batch_sizes"),
        (lambda: mt.distillation_loss(*[torch.ones(2, 2)] * 4, temprature=2.0), "did you mean 'temperature'"),
        (lambda: mt.distillation_loss(*[torch.ones(2, 2)] * 4, kind="kl"), "choose one of forward_kl"),
    ],
)
def test_mistakes_are_one_line(models: Path, call, message: str) -> None:
    with pytest.raises(mt.UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not (models / "x").exists()
