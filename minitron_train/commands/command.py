"""What a command is: everything that the program knows about one word after `python -m minitron_train`.

The command line, the chain of `run`, the checks before a run, slurm/ and --help read these definitions. A new command is one
file in this folder with a `COMMAND`, and one line in registry.py.
"""

import contextlib
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minitron_train.commands.workspace import Workspace, after_rank0
from minitron_train.config import Config, DataConfig
from minitron_train.planning.check import Needs
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import PATH_MISTAKES, UserError
from minitron_train.runtime.launch import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What Slurm gives a command by default; slurm/NAME.sbatch says the same, and a test compares them.

    Attributes:
        gpus: whether it gets all GPUs of a node, with one rank and 8 cores for each; otherwise one process with 8 cores.
        resumable: whether SIGUSR1 announces the time limit 5 minutes before it, so that a training saves a checkpoint.
    """

    gpus: bool
    resumable: bool = False

    def directives(self, name: str) -> list[str]:
        """The options of sbatch, in the order of the script."""
        where = ["--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8"]
        alone = ["--nodes=1", "--ntasks=1", "--cpus-per-task=8"]
        return [
            *(f"--job-name={name}", "--output=logs/%x-%j.out", "--open-mode=append", "--requeue"),
            *(where if self.gpus else alone),
            "--time=04:00:00",
            *(["--signal=B:USR1@300"] if self.resumable else []),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command.

    Attributes:
        summary, reads, writes: for --help and the table of the README.
        run: does the work.
        result: the text that it prints at its end; a chain prints that of `run` alone.
        sections: of the configuration that it reads, for --help.
        in_chain: whether the chain of a recipe contains it.
        check: refuses contradictions in the settings before anything is allocated; loads no torch.
        text: the data sections whose files it reads, so that a job without them is refused before it is queued.
        needs_teacher: whether a teacher must be there.
        trainings: folders below output_dir in which it leaves trainings that can be interrupted and resumed.
        needs: memory and disk, checked before the work.
        per_member: whether it works on one member of a model family, which `member` names.
        job: what Slurm gives it; None where there is no script for it.
    """

    name: str
    summary: str
    reads: str
    writes: str
    run: Callable[[Workspace], None]
    result: Callable[[Workspace], str] = lambda ws: ""
    sections: tuple[str, ...] = ()
    in_chain: Callable[[Config], bool] = lambda config: False
    check: Callable[[Config], None] = lambda config: None
    text: Callable[[Config], Sequence[DataConfig]] = lambda config: ()
    needs_teacher: bool = False
    trainings: tuple[str, ...] = ()
    needs: Needs | None = None
    per_member: bool = True
    job: Job | None = None


def execute(command: Command, config: Config, typed: list[str], world: World) -> None:
    """Run one command with a workspace of its own.

    Raises:
        UserError: whatever the user can mend; on ranks above 0 a little later, so that rank 0's line comes first.
    """
    with contextlib.ExitStack() as stack:
        try:
            ws = Workspace(config, typed, world, stack)
            command.run(ws)
            if world.is_first and not config.dry_run and (text := command.result(ws)):
                say(text)
        except UserError:
            after_rank0(world.rank)
            raise
        except OSError as error:  # while reading: files.disk_errors words the errors of writing
            denied = dict.fromkeys((errno.EACCES, errno.EPERM), "permission denied; let this user read it")
            remedies = PATH_MISTAKES | denied
            if error.errno not in remedies:
                raise
            after_rank0(world.rank)
            raise UserError(f"{error.filename}: {remedies[error.errno]}") from error


SCORING = ("calibration", "data", "prune", "parallel", "plan")  # sections that whatever scores or prunes reads
TRAINING = ("train", "checkpoint", "eval", "tracking", "parallel", "plan")  # sections that whatever trains reads
