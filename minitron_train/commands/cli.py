"""The command line: COMMAND, then Hydra's overrides. --help alone answers without Hydra."""

import os
import sys

from minitron_train.commands.help import command_help, usage
from minitron_train.commands.registry import COMMANDS, find
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World, check_hub_variables


def run(argv: list[str], world: World) -> None:
    """Parse and execute one command line.

    Raises:
        UserError: an unknown command, recipe, key, option or value, or whatever the command refuses.
    """
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(usage())
        return
    name = find(argv[1]).name
    from minitron_train.commands.configuration import VALUED_OPTIONS, check_override, compose
    from minitron_train.commands.overrides import quote_words
    from minitron_train.commands.recipes import register_recipes
    from minitron_train.config.renamed import current_words

    arguments = quote_words(current_words(argv[2:]))
    pairs = zip(["", *arguments], arguments, strict=False)
    words = [argument for before, argument in pairs if before not in VALUED_OPTIONS]
    if any(word in ("-h", "--help") for word in words):
        print(command_help(name, compose([word for word in words if not word.startswith("-")])))
        return
    register_recipes(words)
    for word in words:
        check_override(word)
    run_under_hydra(name, [argv[0], *arguments], ["python", "-m", "minitron_train", *argv[1:]], world)


def run_under_hydra(name: str, argv: list[str], typed: list[str], world: World) -> None:
    """One command, or one for each point of a sweep.

    Args:
        argv: what Hydra parses; typed: what the user typed, for the records.

    Raises:
        UserError: what Hydra or the command refuses; of a sweep, each message once.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import DictConfig

    from minitron_train.commands.command import execute
    from minitron_train.commands.configuration import one_line, to_config, typed_keys
    from minitron_train.commands.members import settled
    from minitron_train.commands.recipes import home

    mistakes: list[UserError] = []
    here = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name="config")
    def composed(config: DictConfig) -> None:
        try:
            check_hub_variables(os.environ)
            settings = to_config(config, typed_keys(HydraConfig.get().overrides.task))
            execute(COMMANDS[name], settled(COMMANDS[name], settings), typed, world)
        except UserError as error:  # kept from Hydra, which would print lines of its own
            if os.getpid() != here:  # a job of a sweep's launcher: the list would not come back
                raise
            mistakes.append(error)

    sys.argv = argv
    try:
        composed()
    except OverrideParseException as error:
        remedy = "lists look like 'key=[a,b]', words with blanks, commas or brackets like key='\"a, [b]\"'"
        raise UserError(f"argument {error.override!r}: {one_line(error)}; {remedy}") from error
    except HydraException as error:
        message = one_line(error)
        if "data.sources." in message:
            message += "; add a new part of the data as a whole: '+data.sources={NAME: {path: FILE, weight: 1}}'"
        raise UserError(message) from error
    if mistakes:
        raise UserError("; ".join(dict.fromkeys(map(str, mistakes))))
