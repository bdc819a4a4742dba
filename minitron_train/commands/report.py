"""report: one HTML page about everything in the output folder."""

from minitron_train.commands.command import Command, Job
from minitron_train.commands.workspace import Workspace
from minitron_train.config import is_family, origins
from minitron_train.runtime.console import say


def report(ws: Workspace) -> None:
    """One page about the whole folder; of a model family the index page, and the page of each member that was begun."""
    from minitron_train.reporting import write_family_report, write_report

    family = is_family(ws.config)
    members = [ws.config.member] if ws.config.member and family else [*ws.config.members]
    if ws.config.dry_run:
        say(f"report: writes {ws.folder / 'report.html'}")
    elif ws.world.is_first:
        for name in members:
            if (ws.folder / name).is_dir():
                say(f"report: {write_report(ws.folder / name)}")
        if family:
            say(f"report: {write_family_report(ws.folder, ws.config.name, origins(ws.config))}")
        else:
            say(f"report: {write_report(ws.folder)}")


COMMAND = Command(
    name="report",
    summary="write one HTML page about everything in output_dir",
    reads="all of output_dir",
    writes="report.html",
    run=report,
    per_member=False,
    in_chain=lambda config: True,
    job=Job(gpus=False),
)
