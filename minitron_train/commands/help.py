"""What --help prints: the commands and recipes, or the keys of one command."""

import dataclasses
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_args

from minitron_train.commands.recipes import home, recipe_lines
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import Config


def usage() -> str:
    """What --help prints."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: python -m minitron_train COMMAND [+recipe=NAME] [key=value …]",
        "",
        "Prune a large language model and distil it back (Minitron, arXiv 2407.14679).",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "recipes:",
        *recipe_lines(),
        "",
        "python -m minitron_train COMMAND [+recipe=NAME] --help     the keys that the command reads, and their values",
        "python -m minitron_train COMMAND … --cfg job --resolve     the resolved configuration; nothing is run",
        "torchrun --nproc-per-node N -m minitron_train COMMAND …    N processes (srun starts them on a cluster)",
    ]
    return "\n".join(lines)


def command_help(name: str, config: Config) -> str:
    """Keys and their meaning for one command; the values are the recipe's and the command line's, else the defaults."""
    command = COMMANDS[name]
    groups = sorted(path.name for path in (home() / "conf").iterdir() if path.is_dir())
    lines = [f"usage: python -m minitron_train {name} [+recipe=NAME] [key=value …]", "", f"{command.summary}.", ""]
    lines += [f"reads:  {command.reads}", f"writes: {command.writes}", ""]
    lines += ["keys of every command:"]
    lines += [key_line(f, "", config) for f in dataclasses.fields(Config) if not dataclasses.is_dataclass(f.type)]
    for section in dict.fromkeys(command.sections):
        lines += ["", f"{section}:", *key_lines(getattr(config, section), f"{section}.")]
    lines += ["", "presets (GROUP=PRESET reads conf/GROUP/PRESET.yaml):"]
    for group in groups:
        presets = " ".join(sorted(path.stem for path in (home() / "conf" / group).glob("*.yaml")))
        lines.append(f"  {group}: {presets}")
    lines += ["", "recipes:", *recipe_lines()]
    return "\n".join(lines)


def key_lines(section: Any, prefix: str) -> Iterator[str]:
    """A line for each key; sections are walked into."""
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(f.type):
            yield from key_lines(getattr(section, f.name), f"{prefix}{f.name}.")
        else:
            yield key_line(f, prefix, section)


def key_line(f: dataclasses.Field[Any], prefix: str, section: Any) -> str:
    """ "  key=value   meaning", with the choices of an enum unless the meaning names them all."""
    value, meaning = getattr(section, f.name), f.metadata.get("help", "")
    names = [member.name for kind in (f.type, *get_args(f.type)) for member in members(kind)]
    if not set(names) <= set(re.findall(r"\w+", meaning)):
        meaning += f" ({', '.join(names)})"
    return f"  {f'{prefix}{f.name}={shown(value)}':<44} {meaning}"


def members(kind: Any) -> list[Enum]:
    """The choices of an enum; of any other type, none."""
    return list(kind) if isinstance(kind, type(Enum)) else []


def shown(value: Any) -> str:
    """A setting's value; of enums their names, of sections that the user names, these names."""
    if isinstance(value, dict):
        entries = (key if dataclasses.is_dataclass(entry) else f"{key}: {entry}" for key, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list) and any(isinstance(entry, Enum) for entry in value):
        return f"[{', '.join(map(shown, value))}]"
    return value.name if isinstance(value, Enum) else "" if value is None else str(value)
