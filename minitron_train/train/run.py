"""One training run, from two Hugging Face folders to checkpoints and metrics."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from minitron_train.config import Config
from minitron_train.data.ledger import write_data_files
from minitron_train.hf import HFFolder
from minitron_train.parallel.groups import Groups, pipelined
from minitron_train.parallel.switches import connections_warning
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import MachineError
from minitron_train.runtime.files import atomic_write_json
from minitron_train.stages import STOPPED, plain
from minitron_train.train.assemble import assemble, check
from minitron_train.train.hooks import Hook, hooks_of
from minitron_train.train.loop import Trainer
from minitron_train.train.metrics import Console, MetricsFile
from minitron_train.train.profile import ProfileSteps
from minitron_train.train.reporter import Reporter
from minitron_train.train.trackers.tracker import Training
from minitron_train.train.tracking import Trackers


def train(
    config: Config,
    groups: Groups,
    *,
    student: Path,
    teacher: Path | None,
    folder: Path,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train `student` on the teacher's logits, or on labels without a teacher (`pretrain`); collective.

    Training resumes from the newest undamaged checkpoint in `folder`/checkpoints. On SIGTERM or SIGUSR1 all ranks save the
    same step and exit with code 0 (SystemExit); `folder`/stopped.json marks a run that must be started again.

    Args:
        student, teacher: Hugging Face folders of any shapes with the same vocabulary.
        folder: receives checkpoints/, metrics.jsonl and what the trackers write.
        hooks: called before the hooks in train.hooks.

    Returns:
        Facts for the provenance.

    Raises:
        UserError: settings, data or checkpoints do not match, or a loss is not finite.
    """
    student_files, teacher_files = HFFolder(student), HFFolder(teacher) if teacher else None
    for model in filter(None, (student_files, teacher_files)):
        model.announce()
    check(config, groups, student_files.shape, teacher_files and teacher_files.shape)
    hooks = [*hooks, *profile_hooks(config, folder), *hooks_of(config)]
    with contextlib.ExitStack() as stack:
        groups = stack.enter_context(pipelined(config.parallel, groups, config.seed))
        trainer = assemble(config, groups, student_files, teacher_files, folder, stack)
        trainer.hooks = hooks
        trainer.resume()
        first_step = trainer.state.step
        if groups.is_first:
            (folder / STOPPED).unlink(missing_ok=True)
            write_data_files(folder, config.data)
            trainer.reporter = open_reporter(trainer.config, trainer, folder)
            trainer.reporter.record({} if first_step else ancestors(student, teacher), consumed=True)
            report_switches(trainer)
        stopped = run_guarded(trainer)
        if stopped is not None:
            exit_to_resume(trainer, stopped, folder)
        state = trainer.state
        facts: dict[str, Any] = {"steps": state.step, "resumed_at_step": first_step, "tokens": state.tokens}
        facts |= {"precision": trainer.config.train.precision.value, "switches": asdict(trainer.switches)}
        facts |= {"num_skipped": state.num_skipped, "evaluation": state.finite_evaluation}
        facts["data_passes"] = trainer.stream.passes()
        report_passes(facts["data_passes"])
        facts |= {"best_metric": state.best_metric, "best": state.best, "stopped_early": trainer.is_stalled}
        trainer.reporter.record(
            {"student" if teacher else "teacher": folder / "checkpoints"}, consumed=False, facts=facts
        )
        trainer.reporter.close(failed=False)
        groups.barrier()
        return facts


def report_switches(trainer: Trainer) -> None:
    """Print megatron-core's speed switches that this run uses, and what it lacks for them."""
    if words := trainer.switches.words:
        say(f"speed: {words}")
    if warning := connections_warning(trainer.groups, trainer.switches):
        say(f"warning: {warning}")


def profile_hooks(config: Config, folder: Path) -> list[Hook]:
    """The hook that train.profile_steps asks for."""
    if not config.train.profile_steps:
        return []
    first, last = config.train.profile_steps
    return [ProfileSteps(first, last, folder)]


def run_guarded(trainer: Trainer) -> str | None:
    """Run the loop. After a failure, close the reporter and name a lost rank, without collectives."""
    try:
        return trainer.run()
    except BaseException as error:
        trainer.reporter.close(failed=True)
        lost = isinstance(error, RuntimeError) and not isinstance(error, MachineError)
        if lost and trainer.groups.world_size > 1:
            where = f"rank {trainer.groups.rank}, step {trainer.state.step + 1}"
            raise RuntimeError(f"{where}: {trainer.heartbeat.explain()} ({error})") from error
        raise


def report_passes(passes: dict[str, dict[str, float | None]]) -> None:
    """Report the data sources that were read more than once."""
    again = [
        f"{name} {part['passes']:.1f} passes over {part['tokens_per_pass']:,} tokens"
        for name, part in passes.items()
        if part["passes"] and part["passes"] > 1
    ]
    if again:
        say(f"data: {', '.join(again)}")


def exit_to_resume(trainer: Trainer, stopped: str, folder: Path) -> NoReturn:
    """Write stopped.json, which tells a scheduler to start the run again, and exit every rank with code 0."""
    if trainer.groups.is_first:
        mark = {"signal": stopped, "step": trainer.state.step, "num_steps": trainer.num_steps}
        atomic_write_json(folder / STOPPED, mark)
    trainer.reporter.close(failed=False)  # a tracker may wait some seconds for its server
    trainer.groups.barrier()
    again = "start again without force=true" if trainer.config.force and trainer.state.step else "start again"
    where = (
        f"saved at step {trainer.state.step} of {trainer.num_steps}" if trainer.state.step else "before the first step"
    )
    say(f"{stopped}: {where}; {again} to resume")
    raise SystemExit(0)


def open_reporter(config: Config, trainer: Trainer, folder: Path) -> Reporter:
    """Open metrics.jsonl, the trackers and the console to continue after the resumed step; for rank 0."""
    state, measured, name = trainer.state, trainer.reporter, config.title
    file = MetricsFile(folder / "metrics.jsonl", state.reported)
    training = Training(folder=folder, name=name, step=state.reported, run_id=None, config=plain(asdict(config)))
    trackers = Trackers.open(config.tracking, training, former_wandb_id=state.wandb_id)
    console = Console(name, state.step, trainer.num_steps)
    return Reporter(trainer.groups, measured.speed, measured.every_steps, (file, trackers, console), trackers)


def ancestors(student: Path, teacher: Path | None) -> dict[str, Path]:
    """Return the existing folders that a distilled student was made from, by kind: teacher, scores, pruned."""
    if teacher is None:
        return {}
    chain = {"teacher": teacher, "scores": student.parent / "scores", "pruned": student}
    return {kind: folder for kind, folder in chain.items() if folder.exists()}
