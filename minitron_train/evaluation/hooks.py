"""lm-eval's tasks on the student during training, compared with the teacher."""

import contextlib
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minitron_train.config import EvalConfig
from minitron_train.evaluation.journal import Journal
from minitron_train.evaluation.metrics import headline, is_share, metrics_in, ratio_text
from minitron_train.evaluation.run import run_tasks
from minitron_train.model.build import LanguageModel
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.console import say
from minitron_train.train.hooks import Hook
from minitron_train.train.metrics import Metrics

if TYPE_CHECKING:
    from minitron_train.train.loop import Trainer


class TaskHook(Hook):
    """A hook of the training loop that evaluates eval.training_tasks without an export; collective.

    It restores random states and the models' modes, so it does not affect training. Its answers are in
    train/tasks.partial until it is complete, so that an interrupted evaluation resumes there.

    Args:
        tokenizer: Hugging Face folder with the student's tokenizer.
        max_length: tokens of the longest context.
        data_dir: local evaluation data.
    """

    reads_weights = False  # after a step

    def __init__(
        self, evaluation: EvalConfig, tokenizer: Path, max_length: int, groups: Groups, data_dir: Path | None
    ) -> None:
        tasks, limit = evaluation.training_tasks, evaluation.training_limit
        self.evaluation = replace(evaluation, tasks=tasks, limit=limit)
        self.tokenizer, self.max_length, self.groups, self.data_dir = tokenizer, max_length, groups, data_dir
        self.teacher: dict[str, float] | None = None

    def evaluate(self, training: "Trainer") -> Metrics:
        """Return `eval.TASK.METRIC` of the student, `….teacher` of the teacher (measured once), and `….kept`, their ratio.

        Only a metric that is a fraction has `.kept`; a perplexity has none.
        """
        with same_random_states():
            if self.teacher is None:
                teacher = training.objective.teacher
                self.teacher = {} if teacher is None else self.measure(teacher, training, "teacher")
            student = self.measure(training.student, training, "student")
        if self.groups.is_first:
            shutil.rmtree(journals(training), ignore_errors=True)
        found: Metrics = {}
        for name, value in student.items():
            found[f"eval.{name}"] = value
            reference = self.teacher.get(name)
            line = f"{name}: student {value:.4f}"
            if reference is not None:
                found[f"eval.{name}.teacher"] = reference
                line += f" / teacher {reference:.4f}"
                metric = name.rpartition(".")[2]
                if reference and is_share(metric):
                    found[f"eval.{name}.kept"] = value / reference
                line += f" ({ratio_text(metric, value, reference)})" if reference else ""
            say(line)
        return found

    def measure(self, model: LanguageModel, training: "Trainer", label: str) -> dict[str, float]:
        """Return `TASK.METRIC` -> value, the headline metric of each task that has data.

        Raises:
            Interrupted: a signal has ended the evaluation, on every rank.
        """
        journal = Journal(journals(training) / label, identity(model, self.groups), self.groups)
        where = self.tokenizer, self.max_length, self.evaluation, self.groups, self.data_dir
        report, _ = run_tasks(model, *where, journal, training.is_stopped)
        return main_metrics(report["results"])


def journals(training: "Trainer") -> Path:
    """The folder of the journals of an evaluation that is not complete."""
    return training.checkpoints.folder.with_name("tasks.partial")


def identity(model: LanguageModel, groups: Groups) -> str:
    """Text that names the weights in memory: their sum in float64 on rank 0, and the versions that answer with them."""
    weights = list(model.parameters())
    total = torch.stack([weight.detach().sum(dtype=torch.float64) for weight in weights]).sum()
    return f"{float(groups.from_first(total)).hex()} {weights[0].dtype} lm_eval {version('lm_eval')}"


def main_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the headline metric of each task, as `TASK.METRIC` -> value."""
    names = {task: headline(metrics_in(record)) for task, record in results.items()}
    return {f"{task}.{metric}": results[task][metric] for task, metric in names.items() if metric}


@contextlib.contextmanager
def same_random_states() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the block."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
