"""prune: cut the teacher to the student's shape. Runs `score` first when its scores are missing."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands import score
from minitron_train.commands.command import SCORING, Command, Job
from minitron_train.commands.inputs import calibration_tokens
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config
from minitron_train.planning.check import Needs, Option, changed, reserved_bytes
from minitron_train.planning.memory import repair_bytes, slice_bytes
from minitron_train.planning.stages import file_weight_bytes, least_tokens, repair_tokens, scoring_layout
from minitron_train.runtime.console import say
from minitron_train.runtime.files import sha256_file
from minitron_train.runtime.launch import World
from minitron_train.stages import Stage
from minitron_train.stages.layout import PRUNED, SCORES


def prune(ws: Workspace) -> None:
    """Scores, unless they are there; then the kept indices; then the repaired or sliced checkpoint."""
    from minitron_train.pruning.target import check_request

    ws.check_source_is_there()
    if ws.shapes_are_pending:
        say(f"score, prune: would run; the shapes are known once {ws.source_folder} exists")
        ws.mark_pending(ws.pruned_folder)
        return
    student = ws.student_shape
    check_request(ws.source_shape, student, ws.config.prune, ws.config.calibration)
    score.score(ws)
    cut(ws, student)


def cut(ws: Workspace, student: Shape) -> None:
    """Scores -> kept indices -> the pruned folder."""
    from minitron_train.pruning.criterion import outside_criteria
    from minitron_train.pruning.describe import describe
    from minitron_train.pruning.prune import prune_checkpoint

    ws.check_source()
    scores = ws.folder / SCORES / "scores.safetensors"
    inputs = {
        "teacher": ws.fingerprint(ws.source_folder),
        "scores": ws.identity(scores, lambda: sha256_file(scores)),
        **outside_criteria(ws.config.prune),
    }
    stage = Stage(
        name="prune",
        folder=ws.folder / PRUNED,
        inputs=inputs,
        settings={"prune": dataclasses.asdict(ws.config.prune), "student": student.sizes()},
        parent=ws.source_folder,
        notes=tuple(describe(ws.source_shape, student, ws.config.prune)),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        ws.check_fits(COMMAND.name, NEEDS, student, teacher=ws.source_shape)
        teacher = ws.open_source()
        tokens = functools.cache(lambda: calibration_tokens(ws))  # asked by rotation, repair, each iteration
        return prune_checkpoint(
            ws.config, ws.groups, teacher=teacher, student=student, scores=scores, tokens=tokens, folder=folder
        )

    ws.run(stage, work)


def options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """Rotation and repair as configured, on fewer tokens, and neither of them."""
    calibration, settings, tokens = config.calibration, config.prune, repair_tokens(config)
    if not (settings.rotate or settings.repairs):
        return
    layout = scoring_layout(config, cuda=cuda, runtime_bytes=reserved_bytes(config, cuda))
    fitted = 1 - settings.held_out_fraction
    fewer = [tokens // part for part in (2, 4, 8) if fitted * (tokens // part) >= least_tokens(student)]
    for chosen, micro in product((tokens, *fewer), (calibration.micro_batch_size, 1)):
        at_once = dataclasses.replace(layout, micro_batch_size=micro)
        names = {
            "prune.repair_tokens": (tokens, chosen),
            "calibration.micro_batch_size": (calibration.micro_batch_size, micro),
        }
        parts = repair_bytes(teacher, student, settings, at_once, tokens=-(-chosen // world.size))
        yield Option(changed(names), parts["total"])
    plain = slice_bytes(teacher, file_weight_bytes(config))["total"]
    yield Option(("prune.rotate=false", "prune.refit=none", "prune.norm_scale=false"), plain)


NEEDS = Needs(options=options, remedy="run it alone, on a machine with more memory", disk="pruned")
COMMAND = Command(
    name="prune",
    summary="cut the teacher to the student's shape and repair it; run score first if needed",
    reads="teacher/, scores/, calibration text",
    writes="pruned/",
    run=prune,
    sections=("teacher", "student", *SCORING),
    in_chain=lambda config: config.student.path is None,
    check=score.check,
    text=score.calibration_text,
    needs_teacher=True,
    needs=NEEDS,
    job=Job(gpus=True),
)
