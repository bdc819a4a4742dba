"""families: the table of supported model families, as README.md holds it."""

from minitron_train.commands.command import Command
from minitron_train.commands.workspace import Workspace
from minitron_train.runtime.console import say


def families(ws: Workspace) -> None:
    """Print the table in Markdown."""
    from minitron_train.arch.families import families_table

    if ws.world.is_first:
        say(families_table())


COMMAND = Command(
    name="families",
    summary="list the supported model families and what can be done with each",
    reads="nothing",
    writes="nothing",
    run=families,
    per_member=False,
)
