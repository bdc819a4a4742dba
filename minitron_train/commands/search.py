"""search: shapes within a budget are listed, cut, measured, retrained a little, and ranked (arXiv 2407.14679 §2.3)."""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from minitron_train.arch import Shape
from minitron_train.commands import distill, evaluate, export, prune, score, teach
from minitron_train.commands.command import SCORING, TRAINING, Command, Job
from minitron_train.commands.teacher_cache import has_cache
from minitron_train.commands.training import check_settings, held_out_text
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Budget, Config, DataConfig
from minitron_train.evaluation.results import read_evaluation
from minitron_train.planning.check import Needs, Option, reserved_bytes
from minitron_train.planning.memory import WEIGHT_BYTES, Layout, eval_bytes
from minitron_train.planning.precision import settled
from minitron_train.pruning.candidates import Candidate, choose, required_target, table, usable, within_budget
from minitron_train.runtime.console import say
from minitron_train.runtime.files import atomic_folder, atomic_write_json
from minitron_train.runtime.launch import World
from minitron_train.stages.layout import LATENCY_FILE, SCORES, SEARCH


def search(ws: Workspace) -> None:
    """List the candidates; cut, measure and retrain them where search.evaluate and search.retrain_tokens ask for it.

    Each candidate is a run of its own in OUTPUT_DIR/search/NAME, and a second search resumes it. The tasks of a job array
    can try one candidate each (search.only); a search after them finds all of them finished and ranks them.
    With teacher.cache, all candidates read one cache, which is written first. Tasks of an array only read it.
    """
    settings = ws.config.search
    check(ws.config)
    required_target(settings)
    every, refusals = usable(ws.config, ws.source_shape)
    if settings.budget is Budget.latency_ms and every:
        if ws.config.dry_run:
            say(f"search: would measure the latency of {len(every)} shapes, and list those within the budget")
            return
        measure(ws, every)
    found = within_budget(settings, every, refusals)
    if refusals and ws.world.is_first:
        say(f"search: {len(refusals)} shapes of the grid were rejected; first reason: {refusals[0]}")
    chosen = choose(found, settings.only)
    if (settings.evaluate or settings.retrain_tokens) and not ws.config.dry_run:
        score.score(ws)
        if settings.retrain_tokens and ws.config.teacher.cache and settings.only is None and not has_cache(ws):
            teach.teach(ws.sibling(retraining(ws.config)))
        for candidate in chosen:
            if ws.world.is_first:
                say(f"search: {candidate.name} ({found.index(candidate) + 1} of {len(found)})")
            try_out(ws, candidate)
        found.sort(key=lambda candidate: candidate.loss)
    if ws.world.is_first:
        say(table(chosen if settings.only else found))
        if not ws.config.dry_run and settings.only is None:
            atomic_write_json(ws.folder / "search.json", {"candidates": [candidate.row() for candidate in found]})


def measure(ws: Workspace, every: list[Candidate]) -> None:
    """Measure the decode latency of the teacher and of all candidates on rank 0, with random weights."""
    from minitron_train.evaluation.latency import measure_latencies
    from minitron_train.hf import read_json
    from minitron_train.model.build import DTYPES

    config, teacher = ws.config, ws.teacher_shape
    ws.check_teacher_is_there()
    teacher.check_length(
        config.search.context + config.speed.new_tokens, "search.context + speed.new_tokens", "teacher"
    )
    ws.check_fits("search", LATENCY_NEEDS, teacher)
    shapes = {"teacher": teacher} | {candidate.name: candidate.shape for candidate in every}

    def work() -> dict[str, float]:
        device = ws.groups.device
        dtype = DTYPES[settled(config.speed.precision, cuda=device.type == "cuda")]
        source = read_json(ws.teacher_folder / "config.json")
        return measure_latencies(ws.folder / SEARCH / LATENCY_FILE, source, shapes, config, dtype, device)

    found = ws.on_rank0(work)
    if ws.world.is_first:
        say(f"search: the teacher takes {found['teacher']:.3g} ms per token")
    for candidate in every:
        candidate.latency_ms = found[candidate.name]


def check(config: Config) -> None:
    """Refuse settings under which a candidate could not be retrained."""
    if config.search.retrain_tokens:
        check_settings(retraining(config))


def text(config: Config) -> list[DataConfig]:
    """The text of calibration and of validation, and of the stream where candidates are retrained."""
    trained = [config.data] if config.search.retrain_tokens else []
    return [*trained, held_out_text(config), *score.calibration_text(config)]


def retraining(config: Config) -> Config:
    """The settings under which candidates are trained and measured: few tokens, held-out text alone, no tasks."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, num_tokens=config.search.retrain_tokens or config.train.num_tokens),
        eval=dataclasses.replace(config.eval, tasks=[], training_tasks=[]),
        checkpoint=dataclasses.replace(config.checkpoint, best_metric=None),  # it may be of a task
    )


def try_out(ws: Workspace, candidate: Candidate) -> None:
    """Cut one candidate, measure its loss, retrain it a little: stages in its own folder, finished ones are kept."""
    folder = ws.folder / SEARCH / candidate.name
    sizes = {f.name: getattr(candidate.shape, f.name, None) for f in dataclasses.fields(ws.config.student)}
    config = dataclasses.replace(
        retraining(ws.config),
        output_dir=str(folder),
        student=dataclasses.replace(ws.config.student, **sizes | {"path": None}),
        teacher=dataclasses.replace(ws.config.teacher, path=str(ws.teacher_folder)),
    )
    child = ws.sibling(config)
    # the scores are the same for all
    ws.on_rank0(lambda: copy_folder(ws.folder / SCORES, folder / SCORES))
    prune.cut(child, candidate.shape)
    evaluate.evaluate_one(child, "pruned", child.pruned_folder)
    candidate.zero_shot_loss = validation_loss(child, "pruned")
    if ws.config.search.retrain_tokens:
        distill.distill(child)
        export.export(child)
        evaluate.evaluate_one(child, "student", child.student_folder)
        candidate.retrained_loss = validation_loss(child, "student")


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; the copy takes the place of `target` once it is whole."""
    with atomic_folder(target) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)


def validation_loss(ws: Workspace, label: str) -> float:
    """Nats, of one evaluated model; infinite where its perplexity overflowed."""
    perplexity = ws.on_rank0(lambda: read_evaluation(ws.eval_folder / f"{label}.json")["perplexity"])
    return math.inf if perplexity is None else math.log(perplexity)


def latency_options(config: Config, teacher: Shape, student: Shape, world: World, cuda: bool) -> Iterator[Option]:
    """The one way: a single model in memory, the teacher being the largest, with its cache."""
    search, weight_bytes = config.search, WEIGHT_BYTES[config.speed.precision]
    layout = Layout(
        micro_batch_size=search.batch_size,
        seq_length=1,
        weight_bytes=weight_bytes,
        teacher_weight_bytes=weight_bytes,
        runtime_bytes=reserved_bytes(config, cuda),
        cuda=cuda,
    )
    tokens = search.batch_size * (search.context + config.speed.new_tokens)
    cache = 2 * teacher.num_layers * teacher.axis_size("kv") * tokens * weight_bytes
    yield Option((), eval_bytes(teacher, layout)["total"] + cache)


LATENCY_NEEDS = Needs(options=latency_options, remedy="lower search.context or search.batch_size")
COMMAND = Command(
    name="search",
    summary="list the student shapes that fit a budget; on request prune, distil and rank them",
    reads="model or teacher/",
    writes="search.json, search/",
    run=search,
    sections=("model", "teacher", "search", "speed", *SCORING, "teach", "distill", *TRAINING),
    check=check,
    text=text,
    needs_teacher=True,
    job=Job(gpus=True, resumable=True),
)
