"""What the scripts of slurm/ ask Python for: the jobs of a recipe's chain, and whether the ranks of a job can begin.

    python -m minitron_train.commands.slurm chain +recipe=tiny …          output folder, then one command of the chain a line
    python -m minitron_train.commands.slurm candidates +recipe=4b …       output folder, then how many candidates
    python -m minitron_train.commands.slurm accept distill +recipe=tiny …  nothing, where a job may be queued
    python -m minitron_train.commands.slurm check distill +recipe=tiny …  on every rank of a job step; prints the files that mark
                                                                 a training that was stopped and is to be started again

They answer within a second or two; torch is loaded on rank 0 alone, and only to read a model's sizes from its folder.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from minitron_train.commands import cli
from minitron_train.commands.chain import chain, check_early
from minitron_train.commands.workspace import Workspace, after_rank0
from minitron_train.config import Config
from minitron_train.pruning.candidates import Candidate, candidates, choose
from minitron_train.runtime.errors import UserError, error_line
from minitron_train.runtime.launch import World, read_world, whole_number
from minitron_train.runtime.preflight import host_name, preflight
from minitron_train.runtime.signals import guard
from minitron_train.stages.run import STOPPED

USAGE = "python -m minitron_train.commands.slurm chain|candidates|accept COMMAND|check COMMAND [OVERRIDE…]"
NEEDS_TEACHER = ("score", "prune", "distill", "search")


def main(argv: Sequence[str]) -> int:
    """`chain`, `candidates`, `accept` or `check`; a user's mistake is one line and exit code 2."""
    world = World()
    try:
        world = read_world()
        match argv[1:]:
            case ["chain", *arguments]:
                config = cli.compose(arguments)
                commands = chain(config)
                accept(commands, config)
                print("\n".join([config.output_dir, *commands]))
            case ["candidates", *arguments]:
                config = cli.compose(arguments)
                accept(["score", "search"], config)
                print("\n".join([config.output_dir, str(len(search_candidates(config, world)))]))
            case ["accept", command, *arguments]:
                accept([command], cli.compose(arguments))
            case ["check", command, *arguments]:
                config = cli.compose(arguments)
                check(command, config, world, os.environ)
                for mark in marks(command, config, world) if world.is_first else ():
                    print(mark)
            case _:
                raise UserError(f"usage: {USAGE}")
    except UserError as error:
        after_rank0(world.rank)
        print(error_line(error, world.rank if world.size > 1 else None), file=sys.stderr)
        return 2
    return 0


def accept(commands: Sequence[str], config: Config) -> None:
    """Refuse mistakes in the settings, and data that are not there, before anything waits in the queue.

    Raises:
        UserError: what `chain.check_early` refuses; no teacher, and none to come; a part of the data without a path, or a
            path without files.
    """
    from minitron_train.data.sources import files

    if not config.output_dir.isprintable():  # the shell reads it as one line
        raise UserError(f"output_dir={config.output_dir!r}: must be one printable line for slurm/; choose another name")
    check_early(chain(config) if list(commands) == ["run"] else commands, config)
    refuse_without_teacher(commands, config)
    data, calibration = config.data, config.calibration
    held_out = replace(data, path=data.validation_path or data.path, validation_path=None)
    trained = ["search"] if config.search.retrain_tokens else []
    read = [
        (data, ("pretrain", "distill", "run", *trained)),
        (held_out, ("pretrain", "distill", "run", "search", "eval")),
        (
            replace(data, path=calibration.path or data.path),
            () if calibration.tokens_path else ("score", "prune", "search", "run"),
        ),
    ]
    for section, readers in read:
        if not set(commands).isdisjoint(readers):
            files(section)


def refuse_without_teacher(commands: Sequence[str], config: Config) -> None:
    """Refuse commands that need a teacher, unless it is there or a command before them brings it.

    Raises:
        UserError: as the first of them would say.
    """
    whole = chain(config) if list(commands) == ["run"] else commands
    if config.teacher.path is None and config.teacher.source in ("pretrain", "hub", "wheel"):
        return  # by fetch or pretrain, which a chain has, or which an earlier job may be at
    if not set(whole).isdisjoint(NEEDS_TEACHER):
        with ExitStack() as stack:
            Workspace(config, [], World(), stack).check_teacher_is_there()


def search_candidates(config: Config, world: World) -> list[Candidate]:
    """What `search` would try.

    Raises:
        UserError: nothing fits the budget, or nothing would be measured.
    """
    if not config.search.evaluate and not config.search.retrain_tokens:
        raise UserError(
            "search.evaluate=false: there is nothing to run; set search.evaluate=true or search.retrain_tokens"
        )
    with ExitStack() as stack:
        return candidates(config, Workspace(config, [], world, stack).teacher_shape)


def marks(command: str, config: Config, world: World) -> list[Path]:
    """The files that a command's trainings leave when a signal has stopped them."""
    folder = Path(config.output_dir)
    runs = {"pretrain": ["pretrain/train"], "distill": ["train"], "run": ["pretrain/train", "train"]}.get(command, [])
    if command == "search" and config.search.retrain_tokens:
        chosen = choose(search_candidates(config, world), config.search.only)
        runs = [f"search/{candidate.name}/train" for candidate in chosen]
    return [folder / run / STOPPED for run in runs]


def check(command: str, config: Config, world: World, environ: Mapping[str, str]) -> None:
    """What must hold before a job's work begins: teacher, disk, GPUs, the same software, a shared folder, the network.

    Args:
        environ: Slurm's variables, and MASTER_ADDR and MASTER_PORT of the later rendezvous when there are several ranks.

    Raises:
        UserError: all complaints of all ranks, on rank 0; on the others, that there are some.
    """
    folder = Path(config.output_dir)
    complaints = list(gpu_complaints(environ, world))
    if world.is_first:
        complaints += folder_complaints(command, config, world)
    if world.size > 1:
        complaints = preflight(complaints, folder, world, environ)
    if complaints:
        raise UserError("; ".join(complaints))


def gpu_complaints(environ: Mapping[str, str], world: World) -> Iterator[str]:
    """The node has the GPUs that the job was given, and one for every rank; nothing to say about jobs without GPUs."""
    asked, num_ranks = whole_number(environ, "SLURM_GPUS_ON_NODE", 0), world.local_size
    if own := environ.get("SLURM_GPUS_PER_TASK"):  # as in h100:1; a rank sees no others
        counts = ({"SLURM_GPUS_PER_TASK": kind.rpartition(":")[2]} for kind in own.split(","))
        asked, num_ranks = sum(whole_number(count, "SLURM_GPUS_PER_TASK", 0) for count in counts), 1
    if not asked:
        return
    host, found = host_name(environ), count_gpus()
    if found < asked:
        yield f"{host}: the job has {asked} GPUs here, nvidia-smi lists {found}; leave the node out (--exclude={host})"
    elif num_ranks > found:
        yield f"{host}: {num_ranks} ranks for {found} GPUs; set --ntasks-per-node to the number of GPUs"


def count_gpus() -> int:
    """GPUs that this process may use."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU") for line in listed.stdout.splitlines())


def folder_complaints(command: str, config: Config, world: World) -> list[str]:
    """The teacher is there, and what the command writes fits on the disk; a command says more of it by itself."""
    with ExitStack() as stack:
        workspace = Workspace(config, [], world, stack)
        try:
            if command in NEEDS_TEACHER:
                workspace.check_teacher_is_there()
            workspace.folder.mkdir(parents=True, exist_ok=True)
            if config.plan.check and command in ("prune", "distill"):
                refuse_full_disk(command, workspace)
        except UserError as error:
            return [str(error)]
        except OSError as error:
            return [f"output_dir={config.output_dir}: {error.strerror}; choose a folder that every node can write to"]
    return []


def refuse_full_disk(command: str, workspace: Workspace) -> None:
    """As the command itself will, before its ranks load torch."""
    from minitron_train.planning.check import DISK_PARTS, refuse_disk
    from minitron_train.planning.stages import disk_bytes

    pruned = workspace.pruned_folder
    there = command == "distill" and (pruned / "config.json").exists()
    student = workspace.shape_of(pruned) if there else workspace.student_shape
    sizes = disk_bytes(workspace.config, workspace.teacher_shape, student)
    refuse_disk(command, sizes[DISK_PARTS[command]], workspace.folder)


if __name__ == "__main__":
    guard(lambda: main(sys.argv))
