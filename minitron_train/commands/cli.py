"""The command line: COMMAND, then Hydra's overrides. Mistakes are found here, before Hydra, to name what is valid."""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
import msgspec
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_train.commands.config_files import register, with_current_names
from minitron_train.commands.overrides import expand_paths, quote_words
from minitron_train.config import Config
from minitron_train.config.renamed import current_words
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World, check_hub_variables
from minitron_train.runtime.records import damaged, joined, read_bytes

MAX_RECIPE_BYTES = 2**20


class Defaults(typing.TypedDict, total=False):
    """What of a recipe Hydra takes for granted."""

    defaults: list[str | typing.Annotated[dict[str, str | list[str] | None], msgspec.Meta(min_length=1)]]


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One word after `python -m minitron_train`."""

    summary: str
    sections: tuple[str, ...]  # of the configuration that it reads, for --help


SCORING = ("calibration", "data", "prune", "parallel", "plan")
TRAINING = ("train", "checkpoint", "eval", "tracking", "parallel", "plan")
COMMANDS = {
    "fetch": Command("bring a teacher and evaluation data onto this machine", ("teacher", "eval")),
    "pretrain": Command("train a teacher from scratch, with its tokenizer", ("model", "pretrain", "data", *TRAINING)),
    "score": Command("measure the importance of channels, heads, neurons, layers", ("teacher", *SCORING)),
    "prune": Command("cut the teacher to the student's shape (scores first)", ("teacher", "student", *SCORING)),
    "search": Command(
        "list the shapes that fit a budget", ("model", "teacher", "search", *SCORING, "distill", *TRAINING)
    ),
    "distill": Command(
        "train the student on the teacher's logits", ("teacher", "student", "distill", "data", *TRAINING)
    ),
    "eval": Command(
        "perplexity, HellaSwag, MMLU and others, of any stage",
        ("eval", "data", "train", "teacher", "student", "export", "parallel", "plan"),
    ),
    "export": Command("training checkpoint to Hugging Face folder", ("export", "plan")),
    "plan": Command(
        "parameters, memory, FLOPs and hours; nothing is run",
        ("model", "teacher", "student", "cluster", *SCORING, "distill", "train", "checkpoint"),
    ),
    "report": Command("one HTML page about everything that was done", ()),
    "run": Command(
        "the whole chain of a recipe",
        ("model", "pretrain", "teacher", "student", *SCORING, "distill", *TRAINING, "export"),
    ),
}


VALUED_OPTIONS = (  # Hydra's, with a word after them: --cfg job
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"),
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
)
HYDRA_OPTIONS = (
    *VALUED_OPTIONS,
    *("--resolve", "--multirun", "-m", "--run", "-r", "--hydra-help", "--version", "--shell-completion", "-sc"),
)


def home() -> Path:
    """Where conf/ and recipes/ are: the checkout, or the package that was installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    return next(base for base in (package.parent, package) if (base / "conf" / "config.yaml").exists())


def run(argv: list[str], world: World) -> None:
    """Parse and execute one command line.

    Raises:
        UserError: an unknown command, recipe, key, option or value, or whatever the command refuses.
    """
    if len(argv) < 2 or argv[1] in ("-h", "--help", "help"):
        print(usage())
        return
    name, arguments = argv[1], quote_words(current_words(argv[2:]))
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; commands: {' '.join(COMMANDS)}")
    pairs = zip(["", *arguments], arguments, strict=False)
    words = [argument for before, argument in pairs if before not in VALUED_OPTIONS]
    if any(word in ("-h", "--help") for word in words):
        print(command_help(name, [word for word in words if not word.startswith("-")]))
        return
    register_recipes(words)
    for word in words:
        check_override(word)
    sys.argv = [argv[0], *arguments]
    typed = ["python", "-m", "minitron_train", *argv[1:]]

    mistakes: list[UserError] = []
    here = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(home() / "conf"), config_name="config")
    def composed(config: DictConfig) -> None:
        from minitron_train.commands import stories as commands

        try:
            check_hub_variables(os.environ)
            commands.execute(name, to_config(config), typed, world)
        except UserError as error:  # kept from Hydra, which would print lines of its own
            if os.getpid() != here:  # a job of a sweep's launcher: the list would not come back
                raise
            mistakes.append(error)

    try:
        composed()
    except OverrideParseException as error:
        remedy = "lists look like 'key=[a,b]', words with blanks, commas or brackets like key='\"a, [b]\"'"
        raise UserError(f"argument {error.override!r}: {one_line(error)}; {remedy}") from error
    except HydraException as error:
        message = one_line(error)
        if "data.sources." in message:
            message += (
                "; a part that data does not have yet is added whole: '+data.sources={NAME: {path: FILE, weight: 1}}'"
            )
        raise UserError(message) from error
    if mistakes:
        raise UserError("; ".join(dict.fromkeys(map(str, mistakes))))  # of a sweep's jobs, each once


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
            return to_config(hydra.compose("config", overrides=arguments))
    except HydraException as error:
        raise UserError(one_line(error)) from error


def to_config(composed: DictConfig) -> Config:
    """Typed and validated configuration."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    assert isinstance(config, Config)
    expand_paths(config)
    config.validate()
    return config


def one_line(error: BaseException) -> str:
    """The gist of Hydra's and OmegaConf's many-line messages, with the key that they are about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    gist = lines[0] if lines else type(error).__name__
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ and str(error.__cause__) else ""
    details = [f"({key})" if key and key not in gist else "", f"- {cause}" if cause and cause not in gist else ""]
    return " ".join([gist, *filter(None, details)])


def recipes() -> dict[str, Path]:
    """Recipe files by name; those in the working directory's recipes/ win over the program's own."""
    folders = (home() / "recipes", Path("recipes"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def register_recipes(arguments: Iterable[str] = ()) -> None:
    """Make `+recipe=NAME` find the flat files of recipes/; each also sets `name`.

    A file that is no recipe is refused when `arguments` name it, and left out otherwise: the working directory's recipes/
    may be another program's.

    Raises:
        UserError: a recipe that is asked for is damaged.
    """
    asked = {name for word in arguments if word.startswith("+recipe=") for name in word.split("=", 1)[1].split(",")}
    register()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for stem, path in recipes().items():
        try:
            node = with_current_names(read_recipe(path), str(path))
        except UserError:
            if stem in asked:
                raise
            continue
        node.setdefault("name", stem)
        store.store(group="recipe", name=stem, node=node, package="_global_")


def read_recipe(path: Path) -> DictConfig:
    """One recipe file, as it stands.

    Raises:
        UserError: it cannot be read, is not YAML, or is no mapping of settings.
    """
    remedy = "correct the file"
    try:
        text = read_bytes(path, max_bytes=MAX_RECIPE_BYTES).decode("utf-8-sig")
        node = OmegaConf.create(text)
    except FileNotFoundError:  # a link to nowhere
        raise UserError(f"{path}: no such file; {remedy}, or remove it") from None
    except AssertionError:  # of OmegaConf, for a number
        node = None
    except UserError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:  # ValueError: dates, UTF-8
        raise damaged(str(path), joined(error), remedy) from None
    if not isinstance(node, DictConfig):
        raise damaged(str(path), "a recipe maps settings to values", remedy)
    try:
        msgspec.convert(OmegaConf.to_container(node), Defaults)
    except (msgspec.ValidationError, OmegaConfBaseException) as error:
        raise damaged(str(path), joined(error), f"{remedy}: defaults look like [NAME, /model: NAME]") from None
    return node


def check_override(argument: str) -> None:
    """Refuse an override whose key, group option or recipe does not exist, naming those that do."""
    if argument.startswith("-"):
        refuse_unknown(argument.split("=")[0], HYDRA_OPTIONS, "option")
        return
    if argument.startswith("~"):
        return
    if "=" not in argument:
        raise UserError(f"argument {argument!r}: settings look like key=value; see --help for the keys")
    key, value = argument.split("=", 1)
    key, prefixed = key.lstrip("+"), argument.startswith("+")
    if key == "recipe":
        if not prefixed:
            raise UserError(f"argument {argument!r}: a recipe is added with a plus: +recipe={value}")
        refuse_unknown(value, recipes(), "recipe")
    elif key.startswith(("hydra.", "hydra/")) or re.search(r"[\[@]", key):
        return
    elif (home() / "conf" / key).is_dir() and not value.startswith("{"):
        refuse_unknown(value, {path.stem for path in (home() / "conf" / key).glob("*.yaml")}, f"option of {key}")
    else:
        check_key(key)


def refuse_unknown(value: str, known: Iterable[str], what: str) -> None:
    """One line with all that would be valid (several options of a sweep are looked at one by one)."""
    for option in value.split(","):
        if option not in known:
            raise UserError(
                f"unknown {what} {option!r}{did_you_mean(option, known)}; there are: {' '.join(sorted(known))}"
            )


def check_key(key: str) -> None:
    """Walk the dataclasses along a dotted key."""
    section: Any = Config
    path: list[str] = []
    for part in key.split("."):
        if not dataclasses.is_dataclass(section):
            if typing.get_origin(section) in (dict, list):
                return  # entries that the user names, as in data.sources
            raise UserError(f"key {key}: {'.'.join(path)} is a value, not a section; set it as {'.'.join(path)}=…")
        known = {f.name: f.type for f in dataclasses.fields(section)}
        if part not in known:
            where = ".".join(path) or "the configuration"
            raise UserError(f"unknown key {key!r}{did_you_mean(part, known)}; {where} has: {' '.join(known)}")
        section = known[part]
        path.append(part)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" when something is close."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


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
        "python -m minitron_train COMMAND [+recipe=NAME] --help     the keys that a command reads, and their values",
        "python -m minitron_train COMMAND … --cfg job --resolve     the resolved configuration; nothing is run",
        "torchrun --nproc-per-node N -m minitron_train COMMAND …     several processes (or srun)",
    ]
    return "\n".join(lines)


def recipe_lines() -> list[str]:
    """One line per recipe, from the first comment of its file."""
    found = recipes()
    width = max(map(len, found), default=0)
    return [f"  {name:<{width}}  {summary_of(path)}".rstrip() for name, path in found.items()]


def summary_of(path: Path) -> str:
    """The first comment of a recipe's file."""
    try:
        lines = read_bytes(path, max_bytes=MAX_RECIPE_BYTES).decode("utf-8-sig", errors="replace").splitlines()
    except (FileNotFoundError, UserError):
        return "(cannot be read)"
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else "(without a comment in its first line)"


def command_help(name: str, arguments: list[str]) -> str:
    """Keys and their meaning for one command; the values are the recipe's and the command line's, else the defaults."""
    command, config = COMMANDS[name], compose(arguments)
    groups = sorted(path.name for path in (home() / "conf").iterdir() if path.is_dir())
    lines = [f"usage: python -m minitron_train {name} [+recipe=NAME] [key=value …]", "", f"{command.summary}.", ""]
    lines += ["keys of every command:"]
    lines += [key_line(f, "", config) for f in dataclasses.fields(Config) if not dataclasses.is_dataclass(f.type)]
    for section in dict.fromkeys(command.sections):
        lines += ["", f"{section}:", *key_lines(getattr(config, section), f"{section}.")]
    lines += ["", "groups (NAME=OPTION picks a file of conf/NAME):"]
    for group in groups:
        options = " ".join(sorted(path.stem for path in (home() / "conf" / group).glob("*.yaml")))
        lines.append(f"  {group}: {options}")
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
    """ "  key=value   meaning"."""
    value, meaning = getattr(section, f.name), f.metadata.get("help", "")
    if isinstance(f.type, type) and not isinstance(f.type, types.GenericAlias) and issubclass(f.type, Enum):
        meaning += f" ({', '.join(member.name for member in f.type)})"
    return f"  {f'{prefix}{f.name}={shown(value)}':<44} {meaning}"


def shown(value: Any) -> str:
    """A setting's value; of sections that the user names, the names."""
    if isinstance(value, dict):
        entries = (key if dataclasses.is_dataclass(entry) else f"{key}: {entry}" for key, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    return value.name if isinstance(value, Enum) else "" if value is None else str(value)
