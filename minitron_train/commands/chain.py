"""The chain of a recipe: the commands that lead from nothing to a report."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from minitron_train.commands import distill, evaluate, export, fetch, pretrain, prune, report, score, speed, teach
from minitron_train.commands.command import Command
from minitron_train.commands.members import member_config, settled
from minitron_train.config import Config, DataConfig, is_family

CHAIN = (
    *(fetch.COMMAND, pretrain.COMMAND, score.COMMAND, prune.COMMAND),
    *(teach.COMMAND, distill.COMMAND, export.COMMAND, evaluate.COMMAND, speed.COMMAND, report.COMMAND),
)
SHARED = (fetch.COMMAND, pretrain.COMMAND)  # in a model family: once for all members

Part = tuple[Config, list[Command]]  # commands in order, and the configuration that they run with


def chain(config: Config) -> list[Command]:
    """The commands that this recipe needs, in order. Each command recognises what is finished by itself."""
    return [command for command in CHAIN if command.in_chain(config)]


def parts(config: Config) -> list[Part]:
    """The chain with its configuration; of a model family the shared commands, each member's chain, and the family's report.

    With `member`, the chain of this member alone.
    """
    if not is_family(config):
        return [(config, chain(config))]
    family = replace(config, member=None)
    members = [member_config(family, name) for name in config.members if config.member in (None, name)]
    chains = [(member, [command for command in chain(member) if command not in SHARED]) for member in members]
    shared = [command for command in SHARED if command.in_chain(family)]
    return [*([(family, shared)] if shared else []), *chains, (family, [report.COMMAND])]


def check_early(commands: Iterable[Command], config: Config) -> None:
    """Refuse now what a later command would refuse after hours; torch is not loaded.

    Raises:
        UserError: settings that contradict each other, tasks that do not exist, evaluation data that are not there,
            generated programs that cannot be isolated, a student that would be written into another stage's folder.
    """
    for check in dict.fromkeys(command.check for command in commands):
        check(config)


def check_text(commands: Iterable[Command], config: Config) -> None:
    """Refuse text or tokens that are missing, before any command reads them.

    Raises:
        UserError: a part of the data without a path, or a path without files.
    """
    from minitron_train.data.sources import files

    checked: list[DataConfig] = []
    for section in (section for command in commands for section in command.text(config)):
        if section not in checked:
            files(section)
            checked.append(section)


def expanded(commands: Sequence[Command], config: Config) -> list[Part]:
    """The commands with `run` replaced by its chain."""
    return [
        part
        for command in commands
        for part in (parts(config) if command.name == "run" else [(settled(command, config), [command])])
    ]
