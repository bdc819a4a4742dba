"""Hooks and a loss function from outside the package, named in the settings of a training."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitron_train.runtime.errors import UserError
from tests.support.training import NUM_STEPS, Material, rows, run

LAB = '''
from minitron_train.train.hooks import Hook

CALLS = []


class Watch(Hook):
    """Writes down its calls, and lets every second optimizer step see no gradient."""

    def before_optimizer(self, training):
        step = training.state.step + 1
        CALLS.append(f"gradients {step}")
        if step % 2 == 0:
            for parameter in training.student.parameters():
                parameter.main_grad.zero_()

    def after_step(self, training, row):
        CALLS.append(f"step {training.state.step} {row['grad_norm'] > 0}")
        return {"lab.norm": row["grad_norm"]}

    def evaluate(self, training):
        return {"eval.lab.acc": 0.25}

    def after_evaluation(self, training, found):
        CALLS.append(f"evaluation {sorted(name for name in found if 'lab' in name)}")


class Silent(Hook):
    def after_step(self, training, row):
        pass


class Wordy(Hook):
    def evaluate(self, training):
        return {"eval.lab.grade": "good"}


class NoHook:
    pass


def squared(student_logits, teacher_logits):
    return (student_logits - teacher_logits).square().mean(-1)
'''


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_lab.py").write_text(LAB)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_lab", None)
    yield "my_lab"
    sys.modules.pop("my_lab", None)  # another test has a package of this name


def test_a_hook_is_called_at_its_places(lab: str, training: Material, tmp_path: Path) -> None:
    run(training, tmp_path / "run", train__hooks=[f"{lab}.Watch"])
    calls = __import__(lab).CALLS
    assert calls[:4] == ["gradients 1", "step 1 True", "gradients 2", "step 2 False"]
    assert calls[-1] == "evaluation ['eval.lab.acc']" and len(calls) == 2 * NUM_STEPS + 1
    logged = rows(tmp_path / "run")
    assert [row["lab.norm"] == row["grad_norm"] for row in logged] == [True] * NUM_STEPS
    assert logged[-1]["eval.lab.acc"] == 0.25


def test_a_loss_function_trains_like_the_fused_one(lab: str, training: Material, tmp_path: Path) -> None:
    from minitron_train.config import LossKind

    run(training, tmp_path / "own", distill__loss_function=f"{lab}.squared")
    run(training, tmp_path / "fused", distill__loss=LossKind.mse)
    own, fused = ([row["loss"] for row in rows(tmp_path / name)] for name in ("own", "fused"))
    assert own == pytest.approx(fused, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__hooks": ["my_lab.NoHook"]}, r"train\.hooks=my_lab\.NoHook: is not a subclass of .*Hook"),
        (
            {"train__hooks": ["my_lab.Absent"]},
            r"train\.hooks=my_lab\.Absent: my_lab defines no function or class Absent",
        ),
        ({"train__hooks": ["my_lab.Silent"]}, r"my_lab\.Silent\.after_step returned None; return a dict of numbers"),
        ({"train__hooks": ["my_lab.Wordy"]}, r"my_lab\.Wordy\.evaluate returned \{'eval.lab.grade': 'good'\}; return"),
        ({"train__hooks": ["Watch"]}, r"train\.hooks=Watch: names no module"),
        ({"distill__loss_function": "no_lab.loss"}, r"distill\.loss_function=no_lab: cannot be imported"),
    ],
)
def test_what_is_not_there_is_refused(
    lab: str, training: Material, tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(training, tmp_path / "run", **settings)
