"""run: the chain, which is every command that a recipe needs, in order."""

from minitron_train.commands import score
from minitron_train.commands.chain import check_early, check_text, parts
from minitron_train.commands.command import SCORING, TRAINING, Command, Job
from minitron_train.commands.members import family_shapes
from minitron_train.commands.workspace import Workspace
from minitron_train.config import is_family, origins
from minitron_train.runtime.console import say


def run(ws: Workspace) -> None:
    """Every command of the chain that is not finished."""
    chains = parts(ws.config)
    for config, commands in chains:
        check_early(commands, config)
        ws.on_rank0(lambda config=config, commands=commands: check_text(commands, config))
    if is_family(ws.config) and ws.knows_teacher_shape:
        family_shapes(ws)
    for config, commands in chains:
        own = ws if config is ws.config else ws.sibling(config)
        if config.member and ws.world.is_first:
            say(f"member {config.member}: {config.output_dir}")
        for command in commands:
            if command is not score.COMMAND:  # prune runs it
                command.run(own)


def result(ws: Workspace) -> str:
    """The table of the models; of a model family that of all its members."""
    from minitron_train.reporting import family_table, summary_table

    return family_table(ws.folder, origins(ws.config)) if is_family(ws.config) else summary_table(ws.folder)


COMMAND = Command(
    name="run",
    summary="run the chain: every command that the recipe needs, in order; of a model family, for each member",
    reads="what the recipe's commands read",
    writes="the folders of these commands",
    run=run,
    result=result,
    sections=("model", "pretrain", "teacher", "student", *SCORING, "distill", *TRAINING, "export", "speed"),
    per_member=False,
    job=Job(gpus=True, resumable=True),
)
