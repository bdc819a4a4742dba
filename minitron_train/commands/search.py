"""search: shapes within a budget are listed, cut, measured, retrained a little, and ranked (arXiv 2407.14679 §2.3)."""

import dataclasses
import math
import shutil
from pathlib import Path

from minitron_train.commands import distill, evaluate, export, prune, score
from minitron_train.commands.command import SCORING, TRAINING, Command, Job
from minitron_train.commands.training import check_settings, held_out_text
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, DataConfig
from minitron_train.evaluation.results import read_evaluation
from minitron_train.pruning.candidates import Candidate, choose, table, usable, within_budget
from minitron_train.runtime.console import say
from minitron_train.runtime.files import atomic_folder, atomic_write_json
from minitron_train.stages.layout import SCORES, SEARCH


def search(ws: Workspace) -> None:
    """List the candidates; cut, measure and retrain them where search.evaluate and search.retrain_tokens ask for it.

    Each candidate is a run of its own in OUTPUT_DIR/search/NAME, and a second search resumes it. The tasks of a job array
    can try one candidate each (search.only); a search after them finds all of them finished and ranks them.
    """
    settings = ws.config.search
    check(ws.config)
    every, refusals = usable(ws.config, ws.source_shape)
    found = within_budget(settings, every, refusals)
    if refusals and ws.world.is_first:
        say(f"search: {len(refusals)} shapes of the grid were rejected; first reason: {refusals[0]}")
    chosen = choose(found, settings.only)
    if (settings.evaluate or settings.retrain_tokens) and not ws.config.dry_run:
        score.score(ws)
        for candidate in chosen:
            if ws.world.is_first:
                say(f"search: {candidate.name} ({found.index(candidate) + 1} of {len(found)})")
            try_out(ws, candidate)
        found.sort(key=lambda candidate: candidate.loss)
    if ws.world.is_first:
        say(table(chosen if settings.only else found))
        if not ws.config.dry_run and settings.only is None:
            atomic_write_json(ws.folder / "search.json", {"candidates": [candidate.row() for candidate in found]})


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


COMMAND = Command(
    name="search",
    summary="list the student shapes that fit a budget; on request prune, distil and rank them",
    reads="model or teacher/",
    writes="search.json, search/",
    run=search,
    sections=("model", "teacher", "search", *SCORING, "distill", *TRAINING),
    check=check,
    text=text,
    needs_teacher=True,
    job=Job(gpus=True, resumable=True),
)
