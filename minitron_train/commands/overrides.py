"""Settings that are text or a path, as people type them: any characters, without the quotes that Hydra's grammar asks for.

    teacher.path=/a/run (2)/step=5      taken as it stands
    output_dir=~/runs/${name}           a leading ~ is expanded; ${name} is the key `name`, \\${name} are seven characters
    teacher.path='/a b', "/a b", null   Hydra's quotes and null keep their meaning
    -m teacher.path=/a,/b               a sweep over two values; '/a,b' is one value

Which keys these are is read off the dataclasses of minitron_train/config: text by the type, paths by `opt(path=True)`.
"""

import contextlib
import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from minitron_train.config import Config
from minitron_train.runtime.errors import PATH_MISTAKES, UserError

HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
SWEEPING = ("-m", "--multirun", "hydra.mode=MULTIRUN")
QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
PART = re.compile(rf"(?:{QUOTED})(?=,|$)|[^,]+", re.DOTALL)  # of a sweep
FUNCTION = re.compile(r"(?:choice|glob|range|interval|shuffle|sort|tag)\(.*\)", re.DOTALL)  # Hydra's, over a sweep
ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")  # Hydra's own escapes, which earlier command lines had to use
PLAIN = re.compile(r"(?!(?i:true|false|nan|inf)$)(?:\.{0,2}/)?[A-Za-z_][\w./-]*", re.ASCII)  # needs no quotes


def quote_words(words: Sequence[str]) -> list[str]:
    """The words of a command line as Hydra's grammar wants them.

    Raises:
        UserError: a word that is not UTF-8.
    """
    for word in words:
        if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"argument {word!r}: is not UTF-8; rename the file, or write the word in UTF-8")
    sweeping = any(word in SWEEPING for word in words)
    return [quote_word(word, sweeping=sweeping) for word in words]


def quote_word(word: str, *, sweeping: bool) -> str:
    """`key=value` with its value quoted where the key takes text; other words as they are."""
    key, equals, value = word.partition("=")
    if not equals or word.startswith(("-", "~")) or not takes_text(key.lstrip("+")):
        return word
    if not sweeping:
        return f"{key}={quoted(value)}"
    if FUNCTION.fullmatch(value):
        return word
    return f"{key}={PART.sub(lambda part: quoted(part[0]), value)}"


def quoted(value: str) -> str:
    """One value in quotes, unless it has them, needs none, is null, or uses Hydra's escapes."""
    as_it_is = not value or value.lower() == "null" or PLAIN.fullmatch(value) or re.fullmatch(QUOTED, value, re.DOTALL)
    if as_it_is or (ESCAPED.search(value) and is_one_value(value)):
        return value
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def is_one_value(value: str) -> bool:
    """Whether Hydra's grammar reads the value as it stands, and as one."""
    try:
        return not OverridesParser.create().parse_override(f"key={value}").is_sweep_override()
    except HydraException:
        return False


def takes_text(key: str) -> bool:
    """Whether a dotted key of the configuration is a string, or None."""
    kind: Any = Config
    for part in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = next((f.type for f in dataclasses.fields(kind) if f.name == part), None)
        else:  # the entries of data.sources and the like
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind is str or set(typing.get_args(kind)) == {str, type(None)} or key in HYDRA_PATHS


def paths(section: Any, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """The paths that are set: the section and the field's name, and the whole key."""
    for f in dataclasses.fields(section):
        value, key = getattr(section, f.name), f"{prefix}{f.name}"
        if f.metadata.get("path") and isinstance(value, str):
            yield section, f.name, key
        parts = {key: value} | ({f"{key}.{name}": part for name, part in value.items()} if type(value) is dict else {})
        for where, part in parts.items():
            if dataclasses.is_dataclass(part):
                yield from paths(part, f"{where}.")


def expand_paths(config: Config) -> None:
    """Put the home folder in the place of a leading ~ in every path, and refuse those that no file can have.

    Raises:
        UserError: a path with a NUL, a name that is too long, or links that form a circle.
    """
    for section, name, key in paths(config):
        path = getattr(section, name)
        if path.startswith("~"):
            with contextlib.suppress(RuntimeError):  # ~name of nobody is a name
                path = str(Path(path).expanduser())
                setattr(section, name, path)
        try:
            Path(path).stat()
        except OSError as error:  # a path that is not there, or not yet, is the commands' matter
            if error.errno in PATH_MISTAKES:
                shown = path if len(path) <= 200 else f"{path[:200]}…"
                raise UserError(f"{key}={shown}: {PATH_MISTAKES[error.errno]}") from error
        except ValueError as error:
            raise UserError(f"{key}={path!r}: is not a path ({error}); check its characters") from error
