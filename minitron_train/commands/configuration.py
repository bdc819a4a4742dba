"""From words to a validated configuration, through Hydra. Mistakes are found before Hydra, to name what is valid."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_train.commands.overrides import expand_paths, quote_words
from minitron_train.commands.recipes import home, recipes, register_recipes
from minitron_train.config import Config, without_typed
from minitron_train.config.renamed import current_words
from minitron_train.runtime.errors import UserError, did_you_mean

VALUED_OPTIONS = (  # Hydra's, with a word after them: --cfg job
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"),
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
)
HYDRA_OPTIONS = (
    *VALUED_OPTIONS,
    *("--resolve", "--multirun", "-m", "--run", "-r", "--hydra-help", "--version", "--shell-completion", "-sc"),
)

WRONG_VALUE = "Error merging override "  # Hydra's, before the user's key=value
RULES = {  # by OmegaConf's complaint
    r"could not be converted to Integer": "must be a whole number",
    r"could not be converted to Float": "must be a number",
    r"is not a valid bool": "must be true or false",
    r"is not a ListConfig": "must be a list; write it like [a,b]",
    r"is not Optional": "must have a value",
    r"expected one of (\[.*\])": r"must be one of \1",
}


def compose(arguments: list[str]) -> Config:
    """The validated configuration of a command line, without running it.

    Raises:
        UserError: an unknown recipe, key, option or value.
    """
    arguments = quote_words(current_words(arguments))
    register_recipes(arguments)
    for argument in arguments:
        check_override(argument)
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(home() / "conf")):
            return to_config(hydra.compose("config", overrides=arguments), typed_keys(arguments))
    except HydraException as error:
        raise UserError(one_line(error)) from error


def to_config(composed: DictConfig, keys: Iterable[str] = ()) -> Config:
    """Typed and validated configuration.

    Args:
        keys: dotted keys that the user has typed; they win over the settings of a model family's members.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(config, Config)
    expand_paths(config)
    without_typed(config, keys)
    config.validate()
    return config


def typed_keys(words: Iterable[str]) -> Iterator[str]:
    """The dotted keys of a command line."""
    for override in OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")]):
        yield from dotted(override.key_or_group, override.value())


def dotted(key: str, value: Any) -> Iterator[str]:
    """The dotted keys of a setting; a mapping is walked into."""
    if not isinstance(value, Mapping) or not value:
        yield key
    else:
        for name, part in value.items():
            yield from dotted(f"{key}.{name}", part)


def one_line(error: BaseException) -> str:
    """The gist of Hydra's and OmegaConf's many-line messages, with the key that they are about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    gist = lines[0] if lines else type(error).__name__
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ and str(error.__cause__) else ""
    if gist.startswith(WRONG_VALUE) and cause:
        found = [match.expand(rule) for complaint, rule in RULES.items() if (match := re.search(complaint, cause))]
        return f"{gist.removeprefix(WRONG_VALUE)}: {found[0] if found else cause}"
    details = [f"({key})" if key and key not in gist else "", f"- {cause}" if cause and cause not in gist else ""]
    return " ".join([gist, *filter(None, details)])


def check_override(argument: str) -> None:
    """Refuse an override whose key, preset or recipe does not exist, naming those that do."""
    if argument.startswith(("--recipe", "recipe=")) or argument in recipes():
        name = argument if argument in recipes() else argument.partition("=")[2] or "NAME"
        raise UserError(f"argument {argument!r}: a recipe is added with a plus: +recipe={name}")
    if argument.startswith("-"):
        refuse_unknown(argument.split("=")[0], HYDRA_OPTIONS, "option")
        return
    if argument.startswith("~"):
        return
    if "=" not in argument:
        raise UserError(f"argument {argument!r}: settings look like key=value; see --help for the keys")
    key, value = argument.split("=", 1)
    key = key.lstrip("+")
    if key == "recipe":
        refuse_unknown(value, recipes(), "recipe")
    elif key.startswith("members."):
        raise UserError(
            f"argument {argument!r}: set this in the recipe, or give member=NAME and the key of the section"
        )
    elif key.startswith(("hydra.", "hydra/")) or re.search(r"[\[@]", key):
        return
    elif (home() / "conf" / key).is_dir() and not value.startswith("{"):
        refuse_unknown(value, {path.stem for path in (home() / "conf" / key).glob("*.yaml")}, f"preset of {key}")
    else:
        kind = check_key(key)
        if dataclasses.is_dataclass(kind) and not value.startswith(("{", "$")):
            first = dataclasses.fields(kind)[0].name
            raise UserError(
                f"argument {argument!r}: {key} is a section without presets; set its keys, as {key}.{first}=…"
            )


def refuse_unknown(value: str, known: Iterable[str], what: str) -> None:
    """Refuse a value that is not known, and list the known ones. The values of a sweep are checked one by one."""
    for option in value.split(","):
        if option not in known:
            raise UserError(
                f"unknown {what} {option!r}{did_you_mean(option, known)}; choose one of: {' '.join(sorted(known))}"
            )


def check_key(key: str) -> Any:
    """Walk the dataclasses along a dotted key, and return the type of its value; None below a mapping or a list."""
    section: Any = Config
    path: list[str] = []
    for part in key.split("."):
        if not dataclasses.is_dataclass(section):
            if typing.get_origin(section) in (dict, list):
                return None  # the user names the entries, as in data.sources
            raise UserError(f"key {key}: {'.'.join(path)} is a value, not a section; set it as {'.'.join(path)}=…")
        known = {f.name: f.type for f in dataclasses.fields(section)}
        if part not in known:
            where = ".".join(path) or "the configuration"
            raise UserError(f"unknown key {key!r}{did_you_mean(part, known)}; {where} has: {' '.join(known)}")
        section = known[part]
        path.append(part)
    return section
