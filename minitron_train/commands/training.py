"""What pretrain and distill share: the training loop as a stage, its early checks, and the memory that it needs."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands.inputs import check_isolated, load_tokenizer, stream_inputs
from minitron_train.commands.teacher_cache import cache_input
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, DataConfig, Precision
from minitron_train.planning.check import Needs, Option, changed, reserved_bytes
from minitron_train.planning.counts import parameters
from minitron_train.planning.estimate import configured_layout
from minitron_train.planning.hardware import cuda_here
from minitron_train.planning.layouts import parallel_sizes
from minitron_train.planning.memory import distill_bytes
from minitron_train.planning.precision import settled
from minitron_train.planning.rates import with_rates
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.stages import Stage, begun_before_requeue, read_provenance, read_started_record, resumed_folder


def train_stage(
    ws: Workspace, config: Config, name: str, needs: Needs, *, folder: Path, student: Path, teacher: Path | None
) -> None:
    """The training loop in a folder that it resumes in."""
    from minitron_train.data.ledger import check_data_files
    from minitron_train.data.tokenizers import check_same
    from minitron_train.train import assemble
    from minitron_train.train.run import train
    from minitron_train.train.settings import deciding_settings

    check_settings(config)
    config = settle_rates(ws, config, student)
    stage = training_stage(ws, config, name, folder=folder, student=student, teacher=teacher)
    config = with_precision(ws, config, stage)
    stage = replace(stage, settings=deciding_settings(config, distilled=teacher is not None))

    def check_fits() -> None:
        shape = ws.shape_of(student)
        ws.check_fits(name, needs, shape, teacher=None if teacher else shape, config=config)

    def work(target: Path) -> Mapping[str, Any]:
        check_fits()
        hooks = [task_hook(ws, student)] if config.eval.training_tasks else []
        return train(config, ws.groups, student=student, teacher=teacher, folder=target, hooks=hooks)

    if config.force and not config.dry_run:  # refuse this run before it replaces an earlier one
        check_fits()
        assemble.check(config, ws.groups, ws.shape_of(student), ws.shape_of(teacher) if teacher else None)
        if teacher is not None:
            check_same(load_tokenizer(student), teacher)
    if not (config.force or config.dry_run):
        ws.on_rank0(lambda: check_data_files(folder, config.data))
    ws.run(stage, work)


def training_stage(
    ws: Workspace, config: Config, name: str, *, folder: Path, student: Path, teacher: Path | None
) -> Stage:
    """What a training reads, and which settings decide what it learns."""
    from minitron_train.runtime.plugins import code_hash, import_name
    from minitron_train.train.settings import deciding_settings

    inputs = {"student": ws.fingerprint(student)} | stream_inputs(ws)
    if teacher is not None:
        inputs["teacher"] = ws.fingerprint(teacher)
        if config.teacher.cache:
            inputs |= cache_input(ws)
        if config.distill.loss_function:
            inputs["loss function"] = code_hash(import_name("distill.loss_function", config.distill.loss_function))
    settings = deciding_settings(config, distilled=teacher is not None)
    return Stage(name=name, folder=folder, inputs=inputs, settings=settings, parent=student, mode="resumable")


def settle_rates(ws: Workspace, config: Config, student: Path) -> Config:
    """Replace null by a learning rate and a warm-up, and print why. A dry run does not know a student that is not made yet."""
    num_parameters = 0 if ws.is_pending(student) else parameters(ws.shape_of(student))["parameters"]
    train, line = with_rates(config.train, num_parameters)
    if line and num_parameters:
        ws.say_once(f"distill: {line}")
    return replace(config, train=train)


def with_precision(ws: Workspace, config: Config, stage: Stage) -> Config:
    """Replace precision=auto of student and teacher by what the training began with, else by this machine's faster one."""

    def settle(section: str, key: str) -> Precision:
        keeps = not config.force or begun_before_requeue(stage)
        began = recorded_precision(resumed_folder(stage), section, key) if keeps else None
        return began or settled(Precision.auto, cuda=cuda_here())

    for section, key in (("train", "precision"), ("distill", "teacher_precision")):
        if section in stage.settings and getattr(getattr(config, section), key) is Precision.auto:
            found = ws.on_rank0(functools.partial(settle, section, key))
            config = replace(config, **{section: replace(getattr(config, section), **{key: found})})
    return config


def recorded_precision(folder: Path, section: str = "train", key: str = "precision") -> Precision | None:
    """What a training began with; None where none began, or where its record is damaged (the stage refuses it later)."""
    with contextlib.suppress(UserError):
        record = read_provenance(folder) or read_started_record(folder)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return Precision(record["settings"][section][key]) if record else None
    return None


def task_hook(ws: Workspace, student: Path) -> Any:
    """lm-eval's tasks on the live student, as eval.training_tasks asks."""
    from minitron_train.evaluation.hooks import TaskHook

    length = ws.shape_of(student).max_position_embeddings
    return TaskHook(ws.config.eval, student, length, ws.groups, ws.local_eval_data)


def check_settings(config: Config) -> None:
    """Refuse settings of a training that contradict each other, and trackers and tasks that cannot be used here.

    Raises:
        UserError: the first contradiction.
    """
    from minitron_train.evaluation.task_names import check_names
    from minitron_train.train import settings
    from minitron_train.train.tracking import check_packages

    check_packages(config.tracking)
    check_isolated(config.eval, config.eval.training_tasks)
    settings.check_settings(config, distilled=True)
    check_names(config.eval.training_tasks)


def held_out_text(config: Config) -> DataConfig:
    """The text that validation reads."""
    return replace(config.data, path=config.data.validation_path or config.data.path, validation_path=None)


def training_text(config: Config) -> list[DataConfig]:
    """The text of the stream and of validation."""
    return [config.data, held_out_text(config)]


def pretrain_options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The same as for distill, without a teacher."""
    return distill_options(config, None, student, world, cuda)


def distill_options(
    config: Config, teacher: Shape | None, student: Shape, world: World, cuda: bool
) -> Iterator[Option]:
    """The configured layout first, then the others that the same processes can take."""
    train, tp = config.train, config.parallel.tensor_model_parallel_size
    now = configured_layout(
        config,
        num_ranks=world.size,
        cuda=cuda,
        runtime_bytes=reserved_bytes(config, cuda),
    )
    yield Option((), distill_bytes(teacher, student, now)["total"])
    for size, ep in parallel_sizes(world.size // now.pp, *filter(None, (teacher, student))):
        for micro in (micro for micro in range(1, train.micro_batch_size + 1) if train.micro_batch_size % micro == 0):
            for recompute in ("none", "selective", "full"):
                dp = world.size // (size * now.pp)
                other = dataclasses.replace(now, tp=size, dp=dp, ep=ep, micro_batch_size=micro, recompute=recompute)
                names = {
                    "parallel.tensor_model_parallel_size": (tp, size),
                    "parallel.expert_model_parallel_size": (config.parallel.expert_model_parallel_size, ep),
                    "train.micro_batch_size": (train.micro_batch_size, micro),
                    "train.recompute": (train.recompute.name, recompute),
                }
                yield Option(changed(names), distill_bytes(teacher, student, other)["total"])
