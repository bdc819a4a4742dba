"""What the scripts of slurm/ ask Python for: the jobs of a recipe's chain, and whether the ranks of a job can begin.

    python -m minitron_train.commands.slurm chain +recipe=tiny …           prints the output folder, then a job per line
    python -m minitron_train.commands.slurm candidates +recipe=4b …        prints the output folder, then their number
    python -m minitron_train.commands.slurm accept distill +recipe=tiny …  prints nothing when the job may be queued
                                                   --ranks=distill:128 after chain or accept gives a job's number of ranks
    python -m minitron_train.commands.slurm check distill +recipe=tiny …   runs on every rank of a job step; prints the files
                                                                           that mark a training to be started again

Each answers within two seconds. Only rank 0 loads torch, and only to read a model's sizes from its folder
(search.budget=latency_ms: all ranks, to read the measured latencies).
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from minitron_train.commands.chain import check_early, check_text, expanded, parts
from minitron_train.commands.command import Command
from minitron_train.commands.configuration import compose
from minitron_train.commands.members import family_shapes, settled
from minitron_train.commands.registry import COMMANDS, find
from minitron_train.commands.workspace import Workspace, after_rank0
from minitron_train.config import Budget, Config, is_family, origins
from minitron_train.config.members import ORIGINAL
from minitron_train.pruning.candidates import Candidate, choose, usable, within_budget
from minitron_train.runtime.errors import UserError, error_line
from minitron_train.runtime.launch import World, host_name, read_world, whole_number
from minitron_train.runtime.preflight import preflight
from minitron_train.runtime.signals import guard
from minitron_train.stages import STOPPED
from minitron_train.stages.layout import LATENCY_FILE, SEARCH, TRAINING

RANKS = "--ranks="  # of slurm/site.sh (ranks_of)
USAGE = "python -m minitron_train.commands.slurm chain|candidates|accept COMMAND|check COMMAND [OVERRIDE…]"


def main(argv: Sequence[str]) -> int:
    """`chain`, `candidates`, `accept` or `check`; a user's mistake is one line and exit code 2."""
    world = World()
    try:
        world = read_world()
        words, ranks = ranks_of(argv[1:])
        match words:
            case ["chain", *arguments]:
                config = compose(arguments)
                accept([COMMANDS["run"]], config, ranks)
                print("\n".join([config.output_dir, *jobs(config)]))
            case ["candidates", *arguments]:
                config = compose(arguments)
                accept([COMMANDS["score"], COMMANDS["search"]], config)
                config = settled(COMMANDS["search"], config)
                print("\n".join([config.output_dir, str(len(search_candidates(config, world)))]))
            case ["accept", name, *arguments]:
                accept([find(name)], compose(arguments), ranks)
            case ["check", name, *arguments]:
                command = find(name)
                config = settled(command, compose(arguments))
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


def ranks_of(words: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """The words without those of the form --ranks=COMMAND:NUMBER, and the numbers of ranks by command."""
    parts = [word.removeprefix(RANKS).partition(":") for word in words if word.startswith(RANKS)]
    return [word for word in words if not word.startswith(RANKS)], {name: int(number) for name, _, number in parts}


def accept(commands: Sequence[Command], config: Config, ranks: Mapping[str, int] = MappingProxyType({})) -> None:
    """Refuse mistakes in the settings, and missing data, before anything waits in the queue.

    Args:
        ranks: the number of processes by job, where it is known.

    Raises:
        UserError: what `chain.check_early` refuses; a teacher that is missing and that no command brings; a part of the data
            without a path, or a path without files; a student's shape that the teacher or the ranks rule out; a batch that
            the ranks of a training cannot share.
    """
    if not config.output_dir.isprintable():  # the shell reads it as one line
        raise UserError(f"output_dir={config.output_dir!r}: must be one printable line for slurm/; choose another name")
    chains = expanded(commands, config)
    every = [command for _, chain in chains for command in chain]
    for own, chain in chains:
        check_early(chain, own)
        refuse_batches(chain, own, ranks)
    refuse_without_teacher(every, config)
    refuse_shapes(every, config)
    for own, chain in chains:
        check_text(chain, own)


def jobs(config: Config) -> list[str]:
    """A line for each job of the chain: the numbers of the jobs that it waits for, the command, and the setting `member`.

    A job waits for the job before it. In a model family a member's first job waits only for the models that the member comes
    from, and the family's report waits for every member. The numbers count from 0 and are joined by commas; `-` is none.
    """
    lines: list[str] = []
    makers: dict[str, int] = {}  # model -> the job that makes it
    ends: list[int] = []  # the last job of each member
    for own, chain in parts(config):
        member, waits = own.member, ends
        if member:
            models = [model for model in origins(config)[member] if model != ORIGINAL and model in makers] or [ORIGINAL]
            waits = sorted({makers[model] for model in models if model in makers})
        for command in chain:
            words = (",".join(map(str, waits)) or "-", command.name, f"member={member}" if member else "")
            waits = [len(lines)]
            lines.append(" ".join(words).rstrip())
            if not member or command.name == "export":
                makers[member or ORIGINAL] = waits[0]
        if member:
            ends.extend(waits)
    return lines


def refuse_batches(chain: Sequence[Command], config: Config, ranks: Mapping[str, int]) -> None:
    """Refuse a batch that the ranks of a training cannot share.

    Raises:
        UserError: as the training itself would say.
    """
    from minitron_train.train.settings import check_ranks

    for command in chain:
        num_ranks = ranks.get(command.name, ranks.get("run", 0))
        if command.trainings and num_ranks:
            check_ranks(config, num_ranks)


def refuse_without_teacher(commands: Sequence[Command], config: Config) -> None:
    """Refuse commands that need a teacher, unless it is there or a command before them brings it.

    Raises:
        UserError: as the first of them would say.
    """
    if config.teacher.path is None and config.teacher.source in ("pretrain", "hub", "wheel"):
        return  # fetch or pretrain brings it, in this chain or in an earlier job
    if any(command.needs_teacher for command in commands):
        with ExitStack() as stack:
            Workspace(config, [], World(), stack).check_teacher_is_there()


def refuse_shapes(commands: Sequence[Command], config: Config) -> None:
    """Refuse a student that the teacher, the loaders or tensor parallelism rule out, if the teacher's shape is known yet.

    Raises:
        UserError: as prune would say.
    """
    with ExitStack() as stack:
        workspace = Workspace(config, [], World(), stack)
        if not workspace.knows_teacher_shape or all(command.name != "prune" for command in commands):
            return
        if is_family(config):
            family_shapes(workspace)
        elif config.student.path is None:
            _ = workspace.student_shape


def search_candidates(config: Config, world: World) -> list[Candidate]:
    """What `search` would try.

    Raises:
        UserError: nothing fits the budget, nothing would be tried, or no latencies were measured for search.budget=latency_ms.
    """
    if not config.search.evaluate and not config.search.retrain_tokens:
        raise UserError(
            "search.evaluate=false: there is nothing to run; set search.evaluate=true or search.retrain_tokens"
        )
    with ExitStack() as stack:
        workspace = Workspace(config, [], world, stack)
        every, refusals = usable(config, workspace.source_shape)
    if config.search.budget is Budget.latency_ms:
        from minitron_train.evaluation.latency import known_latencies

        file = Path(config.output_dir) / SEARCH / LATENCY_FILE
        known = known_latencies(file, [candidate.name for candidate in every])
        every = [dataclasses.replace(candidate, latency_ms=known[candidate.name]) for candidate in every]
    return within_budget(config.search, every, refusals)


def marks(command: Command, config: Config, world: World) -> list[Path]:
    """The files that a command's trainings leave when a signal has stopped them."""
    chains = expanded([command], config)
    runs = [Path(own.output_dir, run) for own, chain in chains for part in chain for run in part.trainings]
    if command.name == "search" and config.search.retrain_tokens:
        chosen = choose(search_candidates(config, world), config.search.only)
        runs = [Path(config.output_dir, SEARCH, candidate.name, TRAINING) for candidate in chosen]
    return [run / STOPPED for run in runs]


def check(command: Command, config: Config, world: World, environ: Mapping[str, str]) -> None:
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
        complaints = preflight(complaints, folder, world, environ, 60 * config.parallel.rendezvous_minutes)
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


def folder_complaints(command: Command, config: Config, world: World) -> list[str]:
    """The teacher is missing, or what the command writes does not fit on the disk. The command itself checks more."""
    with ExitStack() as stack:
        workspace = Workspace(config, [], world, stack)
        try:
            if command.needs_teacher:
                workspace.check_teacher_is_there()
                workspace.check_source_is_there()
            workspace.folder.mkdir(parents=True, exist_ok=True)
            if config.plan.check and command.needs_teacher and command.needs and command.needs.disk:
                refuse_full_disk(command, workspace)
        except UserError as error:
            return [str(error)]
        except OSError as error:
            return [f"output_dir={config.output_dir}: {error.strerror}; choose a folder that every node can write to"]
    return []


def refuse_full_disk(command: Command, workspace: Workspace) -> None:
    """Refuse as the command itself will, before its ranks load torch."""
    from minitron_train.planning.check import refuse_disk

    assert command.needs is not None
    pruned = workspace.pruned_folder
    there = command.name == "distill" and (pruned / "config.json").exists()
    student = workspace.shape_of(pruned) if there else workspace.student_shape
    refuse_disk(workspace.config, command.name, command.needs, workspace.teacher_shape, student, workspace.folder)


if __name__ == "__main__":
    guard(lambda: main(sys.argv))
