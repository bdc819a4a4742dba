"""score: measure the importance of channels, heads, neurons and layers."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands.command import SCORING, Command, Job
from minitron_train.commands.inputs import calibration_tokens, data_inputs, save_calibration
from minitron_train.commands.workspace import Workspace, subset
from minitron_train.config import Config, DataConfig
from minitron_train.planning.check import MORE_GPUS, Needs, Option, changed, reserved_bytes
from minitron_train.planning.memory import score_bytes
from minitron_train.planning.precision import recorded
from minitron_train.planning.stages import scoring_layout
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import sha256_file
from minitron_train.runtime.launch import World
from minitron_train.stages import Stage
from minitron_train.stages.layout import SCORES


def score(ws: Workspace) -> None:
    """Importance of every channel, head, neuron and layer, from forward passes over the calibration tokens."""
    from minitron_train.pruning.criterion import depth_criterion, width_criterion
    from minitron_train.pruning.scoring import score_checkpoint

    width_criterion(ws.config.prune.width)  # a wrong name is refused before the work
    needs_layer_removal = depth_criterion(ws.config.prune.depth).needs_layer_removal
    ws.check_source()
    ws.source_shape.check_parallel(ws.config.parallel.tensor_model_parallel_size, "teacher")
    stage = scoring_stage(ws)
    with_removal = dataclasses.replace(stage, settings={**stage.settings, "layer_removal": True})
    if needs_layer_removal or is_finished(ws, with_removal):
        stage = with_removal

    def work(folder: Path) -> Mapping[str, Any]:
        ws.check_fits(COMMAND.name, NEEDS, ws.source_shape, teacher=ws.source_shape)
        tokens = calibration_tokens(ws, new_in=folder)
        return score_checkpoint(ws.config, ws.groups, teacher=ws.open_source(), tokens=tokens, folder=folder)

    ws.run(stage, work)
    if ws.config.calibration.save_path and not ws.config.dry_run:
        save_calibration(ws, Path(ws.config.calibration.save_path))


def scoring_stage(ws: Workspace) -> Stage:
    """The stage without layer removal: what it reads, and which settings decide its result."""
    from minitron_train.data.calibration import calibration_data

    calibration = ws.config.calibration
    precision = {"precision": recorded(calibration.precision)}
    numbers = {**subset(calibration, "path", "num_samples", "seq_length"), **precision}
    if calibration.self_generated_fraction:
        numbers = {**numbers, "self_generated_fraction": calibration.self_generated_fraction}
    settings: dict[str, Any] = {"calibration": numbers, "seed": ws.config.seed}
    inputs = {"teacher": ws.fingerprint(ws.source_folder)}
    if calibration.tokens_path is None:
        key = "calibration.path" if calibration.path else None
        inputs |= data_inputs(ws, calibration_data(calibration, ws.config.data), key)
    elif Path(calibration.tokens_path).exists():
        settings = {"calibration": precision}
        inputs["tokens"] = sha256_file(Path(calibration.tokens_path))
    return Stage(name="score", folder=ws.folder / SCORES, inputs=inputs, settings=settings, parent=ws.source_folder)


def is_finished(ws: Workspace, stage: Stage) -> bool:
    """Whether this stage is finished and may be kept. Scores with layer removal also serve where it is not asked for."""
    return not ws.config.force and ws.on_rank0(lambda: stage.state()[0] == "finished")


def calibration_text(config: Config) -> list[DataConfig]:
    """The text that calibration reads; none where calibration.tokens_path gives the tokens."""
    if config.calibration.tokens_path:
        return []
    return [dataclasses.replace(config.data, path=config.calibration.path or config.data.path)]


def check(config: Config) -> None:
    """Refuse a calibration.tokens_path that is not there.

    Raises:
        UserError: there is no such file.
    """
    path = config.calibration.tokens_path
    if path and not Path(path).exists():
        raise UserError(f"calibration.tokens_path={path}: no such file; correct the path, or leave it out")


def options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The configured way of scoring first, then streamed and in smaller pieces."""
    calibration = config.calibration
    tokens = calibration.num_samples * calibration.seq_length
    layout = scoring_layout(config, cuda=cuda, runtime_bytes=reserved_bytes(config, cuda))
    micro_sizes = {calibration.micro_batch_size, max(calibration.micro_batch_size // 4, 1), 1}
    ways = [
        (bool(calibration.streamed), calibration.micro_batch_size, calibration.chunk_tokens),
        *(
            (on, micro, chunk)
            for on in (False, True)
            for micro in micro_sizes
            for chunk in (calibration.chunk_tokens, 16384)
        ),
    ]
    for streamed, micro, chunk in ways:
        at_once = dataclasses.replace(layout, micro_batch_size=micro)
        names = {
            "calibration.streamed": (streamed if calibration.streamed is None else calibration.streamed, streamed),
            "calibration.micro_batch_size": (calibration.micro_batch_size, micro),
            "calibration.chunk_tokens": (calibration.chunk_tokens, chunk),
        }
        parts = score_bytes(teacher, at_once, chunk_tokens=min(chunk, tokens), streamed=streamed)
        yield Option(changed(names), parts["total"])


NEEDS = Needs(options=options, remedy=MORE_GPUS)
COMMAND = Command(
    name="score",
    summary="measure the importance of channels, heads, neurons and layers",
    reads="teacher/, calibration text",
    writes="scores/",
    run=score,
    sections=("teacher", *SCORING),
    in_chain=lambda config: config.student.path is None,
    check=check,
    text=calibration_text,
    needs_teacher=True,
    needs=NEEDS,
    job=Job(gpus=True),
)
