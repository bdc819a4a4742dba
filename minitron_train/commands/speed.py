"""speed: measure size, memory and tokens per second of teacher, pruned model and student."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands.command import Command, Job
from minitron_train.commands.export import write_model_card
from minitron_train.commands.workspace import Workspace, subset
from minitron_train.config import Config
from minitron_train.planning.check import Needs, Option, reserved_bytes
from minitron_train.planning.memory import WEIGHT_BYTES, Layout, eval_bytes
from minitron_train.planning.precision import recorded, settled
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_json
from minitron_train.runtime.launch import World
from minitron_train.stages import Stage
from minitron_train.stages.layout import SPEED, SPEED_FILE

DECIDING = ("batch_sizes", "prompt_tokens", "new_tokens", "turns")


def speed(ws: Workspace) -> None:
    """Time the models of all finished stages in turn, on rank 0: speed/speed.json and the model card."""
    folders = {label: folder for label, folder in ws.model_folders.items() if ws.is_there(folder)}
    if not folders:
        raise UserError(f"nothing to measure in {ws.folder}; run the earlier stages, or give teacher.path=FOLDER")
    settings = {**subset(ws.config.speed, *DECIDING), "precision": recorded(ws.config.speed.precision)}
    stage = Stage(
        name="speed",
        folder=ws.folder / SPEED,
        inputs={label: ws.fingerprint(folder) for label, folder in folders.items()},
        settings={"speed": settings, "seed": ws.config.seed},
    )

    def work(folder: Path) -> Mapping[str, Any]:
        shapes = {label: ws.shape_of(place) for label, place in folders.items()}
        smallest = min(shapes.values(), key=lambda shape: shape.num_layers * shape.hidden_size)
        ws.check_fits("speed", NEEDS, smallest, teacher=shapes.get("teacher", smallest))
        ws.on_rank0(functools.partial(measure_into, ws, folders, folder))
        return {}

    ws.run(stage, work)
    write_model_card(ws)


def result(ws: Workspace) -> str:
    """The table of the evaluations and of the speeds."""
    from minitron_train.reporting import summary_table

    return summary_table(ws.folder)


def measure_into(ws: Workspace, folders: Mapping[str, Path], target: Path) -> None:
    """Measure, and write the record into the stage's folder."""
    from minitron_train.evaluation.speed import measure
    from minitron_train.model.build import DTYPES

    device = ws.groups.device
    precision = settled(ws.config.speed.precision, cuda=device.type == "cuda")
    found = measure(folders, ws.config.speed, DTYPES[precision], device, ws.config.seed)
    atomic_write_json(target / SPEED_FILE, dict(found))


def options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The configured batch sizes first, then smaller ones; teacher, pruned model and student are in memory together."""
    settings, weight_bytes = config.speed, WEIGHT_BYTES[config.speed.precision]
    now = Layout(
        micro_batch_size=max(settings.batch_sizes),
        seq_length=settings.prompt_tokens + settings.new_tokens,
        weight_bytes=weight_bytes,
        teacher_weight_bytes=weight_bytes,
        runtime_bytes=reserved_bytes(config, cuda),
        cuda=cuda,
    )
    for batch in sorted({*settings.batch_sizes, 1}, reverse=True):
        layout = dataclasses.replace(now, micro_batch_size=batch)
        taught, own = eval_bytes(teacher, layout), eval_bytes(student, layout)
        smaller = () if batch == now.micro_batch_size else (f"speed.batch_sizes=[{batch}]",)
        yield Option(smaller, taught["total"] + 2 * own["weights"])


NEEDS = Needs(options=options, remedy="run it on a machine with more memory, or set speed.in_run=false")
COMMAND = Command(
    name="speed",
    summary="measure size, memory and tokens per second of teacher, pruned model and student",
    reads="teacher/, pruned/, student/",
    writes="speed/",
    run=speed,
    result=result,
    sections=("speed", "teacher", "student", "export", "parallel", "plan"),
    in_chain=lambda config: config.speed.in_run,
    needs=NEEDS,
    job=Job(gpus=True),
)
