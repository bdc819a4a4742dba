"""All commands, in the order of --help. A new command is one file in this folder and one line here.

Importing the registry loads neither torch nor a model library: the commands import those when they run.
"""

from minitron_train.commands import (
    distill,
    evaluate,
    export,
    families,
    fetch,
    plan,
    pretrain,
    prune,
    report,
    run,
    score,
    search,
    speed,
    teach,
)
from minitron_train.commands.command import Command
from minitron_train.runtime.errors import UserError, did_you_mean

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        fetch.COMMAND,
        pretrain.COMMAND,
        score.COMMAND,
        prune.COMMAND,
        search.COMMAND,
        teach.COMMAND,
        distill.COMMAND,
        export.COMMAND,
        evaluate.COMMAND,
        speed.COMMAND,
        plan.COMMAND,
        families.COMMAND,
        report.COMMAND,
        run.COMMAND,
    )
}


def find(name: str) -> Command:
    """The command of this name.

    Raises:
        UserError: there is none.
    """
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; commands: {' '.join(COMMANDS)}")
    return COMMANDS[name]
