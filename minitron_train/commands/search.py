"""The search: shapes within a budget are cut, measured and retrained a little, and ranked (arXiv 2407.14679 §2.3)."""

import dataclasses
import math
import shutil
from pathlib import Path

from minitron_train.commands import stories as commands
from minitron_train.commands.chain import check_early
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config
from minitron_train.evaluation.results import read_evaluation
from minitron_train.pruning.candidates import Candidate, choose, table, usable, within_budget
from minitron_train.runtime.console import say
from minitron_train.runtime.files import atomic_folder, atomic_write_json


def search(ws: Workspace) -> None:
    """List the candidates; cut, measure and retrain them where search.evaluate and search.retrain_tokens ask for it.

    Each candidate is a run of its own in OUTPUT_DIR/search/NAME, which a second search goes on with: the tasks of a job
    array can try one each (search.only), and a search after them finds all done and ranks them.
    """
    settings = ws.config.search
    if settings.retrain_tokens:
        check_early(["distill"], retraining(ws.config))
    every, refusals = usable(ws.config, ws.teacher_shape)
    found = within_budget(settings, every, refusals)
    if refusals and ws.world.is_first:
        say(f"search: {len(refusals)} shapes of the grid are left out, as {refusals[0]}")
    chosen = choose(found, settings.only)
    if (settings.evaluate or settings.retrain_tokens) and not ws.config.dry_run:
        commands.score(ws)
        for candidate in chosen:
            if ws.world.is_first:
                say(f"search: {candidate.name} ({found.index(candidate) + 1} of {len(found)})")
            try_out(ws, candidate)
        found.sort(key=lambda candidate: candidate.loss)
    if ws.world.is_first:
        say(table(chosen if settings.only else found))
        if not ws.config.dry_run and settings.only is None:
            atomic_write_json(ws.folder / "search.json", {"candidates": [candidate.row() for candidate in found]})


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
    folder = ws.folder / "search" / candidate.name
    sizes = {f.name: getattr(candidate.shape, f.name, None) for f in dataclasses.fields(ws.config.student)}
    config = dataclasses.replace(
        retraining(ws.config),
        output_dir=str(folder),
        student=dataclasses.replace(ws.config.student, **sizes | {"path": None}),
        teacher=dataclasses.replace(ws.config.teacher, path=str(ws.teacher_folder)),
    )
    child = ws.beside(config)
    # the scores are the same for all
    ws.on_rank0(lambda: copy_folder(ws.folder / "scores", folder / "scores"))
    commands.cut(child, candidate.shape)
    commands.evaluate_one(child, "pruned", child.pruned_folder)
    candidate.zero_shot_loss = validation_loss(child, "pruned")
    if ws.config.search.retrain_tokens:
        commands.distill(child)
        commands.export(child)
        commands.evaluate_one(child, "student", child.student_folder)
        candidate.retrained_loss = validation_loss(child, "student")


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; the copy takes the place of `target` once it is whole."""
    with atomic_folder(target) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)


def validation_loss(ws: Workspace, label: str) -> float:
    """Nats, of one evaluated model; infinite where its perplexity overflowed."""
    perplexity = ws.on_rank0(lambda: read_evaluation(ws.eval_folder / f"{label}.json")["perplexity"])
    return math.inf if perplexity is None else math.log(perplexity)
