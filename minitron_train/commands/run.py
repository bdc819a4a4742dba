"""run: the chain, which is every command that a recipe needs, in order."""

from minitron_train.commands import score
from minitron_train.commands.chain import chain, check_early, check_text
from minitron_train.commands.command import SCORING, TRAINING, Command, Job
from minitron_train.commands.workspace import Workspace
from minitron_train.runtime.console import say


def run(ws: Workspace) -> None:
    """Every command of the chain that is not finished, then the table of the result."""
    from minitron_train.reporting import summary_table

    commands = chain(ws.config)
    check_early(commands, ws.config)
    ws.on_rank0(lambda: check_text(commands, ws.config))
    for command in commands:
        if command is not score.COMMAND:  # prune runs it
            command.run(ws)
    if ws.world.is_first and not ws.config.dry_run:
        say(summary_table(ws.folder))


COMMAND = Command(
    name="run",
    summary="run the chain: every command that the recipe needs, in order",
    reads="what the recipe's commands read",
    writes="the folders of these commands",
    run=run,
    sections=("model", "pretrain", "teacher", "student", *SCORING, "distill", *TRAINING, "export", "speed"),
    job=Job(gpus=True, resumable=True),
)
