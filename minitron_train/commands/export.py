"""export: write a training checkpoint as a Hugging Face folder."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands.command import Command, Job
from minitron_train.commands.workspace import PENDING, Workspace
from minitron_train.config import Config
from minitron_train.planning.check import Needs, Option
from minitron_train.planning.memory import export_bytes
from minitron_train.planning.stages import export_weight_bytes
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.stages import Stage, note_export
from minitron_train.stages.layout import STAGE_FOLDERS, TRAINING


def export(ws: Workspace) -> None:
    """A training checkpoint as a Hugging Face folder with its model card."""
    check(ws.config)
    source = Path(ws.config.export.checkpoint) if ws.config.export.checkpoint else ws.folder / TRAINING
    export_stage(ws, COMMAND.name, source=source, target=ws.export_folder, dtype=ws.config.export.dtype)
    if ws.world.is_first and not ws.config.dry_run:
        note_export(ws.folder, ws.export_folder)
    write_model_card(ws)


def export_stage(ws: Workspace, name: str, *, source: Path, target: Path, dtype: str | None) -> None:
    """Training checkpoint -> Hugging Face folder, on one process."""
    from minitron_train.train.export import export_checkpoint, find_checkpoint

    trust = ws.config.checkpoint.trust_external
    found = None
    if not ws.is_pending(source):
        found = ws.on_rank0(lambda: find_checkpoint(source, ws.folder, trust_external=trust))
    inputs = {"checkpoint": found.identity if found else PENDING}
    stage = Stage(name=name, folder=target, inputs=inputs, settings={"dtype": dtype}, parent=source)

    def work(folder: Path) -> Mapping[str, Any]:
        assert found is not None, "a dry run does no work"
        shape = ws.shape_of(found.model)
        ws.check_fits("export", NEEDS, shape, teacher=shape, folder=target)
        return ws.on_rank0(functools.partial(export_checkpoint, found, folder, dtype))

    ws.run(stage, work)


def write_model_card(ws: Workspace) -> None:
    """README.md of the student, with what is known by now."""
    from minitron_train.reporting.card import write_card

    if ws.world.is_first and not ws.config.dry_run and (ws.student_folder / "config.json").exists():
        write_card(ws.student_folder, ws.folder)


def check(config: Config) -> None:
    """Refuse an export.path in a folder that holds something else of the run.

    Raises:
        UserError: it is, or lies in, the folder of another stage, of the teacher or of the evaluation data.
    """
    if not config.export.path:
        return
    target, run = Path(config.export.path), Path(config.output_dir)
    places = [run / name for name in STAGE_FOLDERS]
    places += [Path(path) for path in (config.teacher.path, config.student.path, config.eval.data_dir) if path]
    for place in places:
        if target.resolve().is_relative_to(place.resolve()):
            raise UserError(
                f"export.path={target}: lies in {place}, which holds something else of this run; choose another folder"
            )


def options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The one way: a single process, one shard at a time."""
    yield Option((), export_bytes(student, export_weight_bytes(config))["total"])


NEEDS = Needs(
    options=options, remedy="run it alone, on a machine with more memory", disk="student", in_one_process=True
)
COMMAND = Command(
    name="export",
    summary="convert a training checkpoint to a Hugging Face folder",
    reads="train/",
    writes="student/",
    run=export,
    sections=("export", "plan"),
    in_chain=lambda config: True,
    check=check,
    needs=NEEDS,
    job=Job(gpus=False),
)
