"""report: one HTML page about everything in the output folder."""

from minitron_train.commands.command import Command, Job
from minitron_train.commands.workspace import Workspace
from minitron_train.runtime.console import say


def report(ws: Workspace) -> None:
    """One page about the whole folder."""
    from minitron_train.reporting import write_report

    if ws.config.dry_run:
        say(f"report: writes {ws.folder / 'report.html'}")
    elif ws.world.is_first:
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
