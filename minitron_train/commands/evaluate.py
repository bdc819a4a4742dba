"""eval: measure perplexity and lm-eval's tasks of teacher, pruned model, student or any Hugging Face folder."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_train.arch import Shape
from minitron_train.commands.command import Command, Job
from minitron_train.commands.export import write_model_card
from minitron_train.commands.inputs import check_isolated, data_inputs, load_tokenizer
from minitron_train.commands.training import held_out_text
from minitron_train.commands.workspace import Workspace, subset
from minitron_train.config import Config
from minitron_train.planning.check import MORE_GPUS, Needs, Option, changed, reserved_bytes, tp_sizes
from minitron_train.planning.memory import WEIGHT_BYTES, Layout, eval_bytes
from minitron_train.planning.precision import recorded
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.stages import Stage, read_provenance

if TYPE_CHECKING:
    from minitron_train.train.export import VerifiedCheckpoint

DECIDING = ("tasks", "limit", "limits", "num_fewshot", "shots", "seed", "allow_code_execution")


def evaluate(ws: Workspace) -> None:
    """Evaluate one model, or the model of every finished stage; or compare finished evaluations row by row."""
    if ws.config.eval.compare:
        from minitron_train.evaluation.compare import compare_table

        say(compare_table(ws.eval_folder, ws.config.eval.compare))
        return
    check(ws.config)
    for label, folder in ws.models_to_evaluate().items():
        evaluate_one(ws, label, folder)
    write_model_card(ws)


def result(ws: Workspace) -> str:
    """The table of every evaluation in the output folder; nothing after a comparison, which has printed its own."""
    from minitron_train.reporting import summary_table

    return "" if ws.config.eval.compare else summary_table(ws.folder)


def evaluate_one(ws: Workspace, label: str, model: Path) -> None:
    """One model -> eval/LABEL.json."""
    from minitron_train.data.stream import validation_tokens
    from minitron_train.evaluation.local_data import can_be_completed
    from minitron_train.evaluation.run import evaluate_model
    from minitron_train.evaluation.source import locate, open_origin

    config = ws.config
    weights: Path | VerifiedCheckpoint = model
    if model not in ws.model_folders.values() and not ws.is_pending(model):  # those are never trainings
        trust = config.checkpoint.trust_external
        weights = ws.on_rank0(lambda: locate(model, ws.folder, trust_external=trust))
    stage = evaluation_stage(ws, label, model, weights)

    def work(folder: Path) -> Mapping[str, Any]:
        origin = open_origin(weights)
        origin.shape.check_length(config.train.seq_length, "train.seq_length", label)
        ws.check_fits("eval", NEEDS, origin.shape, teacher=origin.shape)
        tokenizer = load_tokenizer(origin.tokenizer)
        length = config.train.seq_length
        tokens = ws.groups.tensor_from_rank0(lambda: validation_tokens(config.data, tokenizer, length, config.seed))
        return evaluate_model(
            config,
            ws.groups,
            model=weights,
            label=label,
            folder=folder,
            data_dir=ws.local_eval_data,
            validation_tokens=tokens,
        )

    again = not config.force and ws.on_rank0(lambda: can_be_completed(read_provenance(ws.eval_folder, stage.record)))
    ws.run(stage, work, force=again)


def evaluation_stage(ws: Workspace, label: str, model: Path, weights: "Path | VerifiedCheckpoint") -> Stage:
    """What an evaluation reads, and which settings decide its result.

    Args:
        model: the folder as the user names it.
        weights: the same, or the checkpoint that was found in it.
    """
    from minitron_train.data.stream import validation_data
    from minitron_train.evaluation.local_data import listing
    from minitron_train.evaluation.source import open_origin

    config = ws.config
    held_out: dict[str, float] = {"tokens": config.data.validation_tokens, "seq_length": config.train.seq_length}
    if config.data.late_fraction and not config.data.validation_path:
        held_out["late_fraction"] = config.data.late_fraction
    inputs = {"model": ws.identity(model, lambda: open_origin(weights).identity)}
    inputs |= data_inputs(
        ws, validation_data(config.data), "data.validation_path" if config.data.validation_path else None
    )
    inputs["evaluation data"] = ws.identity(ws.eval_data_folder, lambda: listing(ws.eval_data_folder))
    settings = {**subset(config.eval, *DECIDING), "precision": recorded(config.eval.precision)}
    return Stage(
        name=f"eval {label}",
        folder=ws.eval_folder,
        inputs=inputs,
        settings={"eval": settings, "validation": held_out, "seed": config.seed},
        parent=model,
        mode="self_managed",
        record=f"{label}.provenance.json",
    )


def check(config: Config) -> None:
    """Refuse tasks that do not exist or cannot be isolated, and an eval.data_dir that is not there.

    Raises:
        UserError: the first of them.
    """
    from minitron_train.evaluation.task_names import check_keys

    if config.eval.compare:
        return
    check_isolated(config.eval, config.eval.tasks)
    check_keys(config.eval)
    folder = config.eval.data_dir
    if folder and not Path(folder).is_dir():
        raise UserError(f"eval.data_dir={folder}: no such folder; give one, or leave it out")


def options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The configured layout first, then other tensor-parallel sizes and fewer sequences at once."""
    settings, tp = config.eval, config.parallel.tensor_model_parallel_size
    weight_bytes = WEIGHT_BYTES[settings.precision]
    now = Layout(
        tp=tp,
        micro_batch_size=settings.validation_batch_size,
        seq_length=config.train.seq_length,
        weight_bytes=weight_bytes,
        teacher_weight_bytes=weight_bytes,
        runtime_bytes=reserved_bytes(config, cuda),
        cuda=cuda,
    )
    others = product(tp_sizes(world, 1, student), (settings.validation_batch_size, 1))
    for size, batch in [(tp, settings.validation_batch_size), *others]:
        layout = dataclasses.replace(now, tp=size, micro_batch_size=batch)
        names = {
            "parallel.tensor_model_parallel_size": (tp, size),
            "eval.validation_batch_size": (settings.validation_batch_size, batch),
        }
        yield Option(changed(names), eval_bytes(student, layout)["total"])


NEEDS = Needs(options=options, remedy=MORE_GPUS)
COMMAND = Command(
    name="eval",
    summary="measure perplexity and lm-eval's tasks (HellaSwag, MMLU, …) of teacher, pruned model and student",
    reads="teacher/, pruned/, student/, eval_data/, text",
    writes="eval/",
    run=evaluate,
    result=result,
    sections=("eval", "data", "train", "teacher", "student", "export", "parallel", "plan"),
    in_chain=lambda config: True,
    check=check,
    text=lambda config: [held_out_text(config)],
    needs=NEEDS,
    job=Job(gpus=True, resumable=True),
)
