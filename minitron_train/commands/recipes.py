"""Recipes: flat YAML files in recipes/, and where this program keeps them and conf/."""

import typing
from collections.abc import Iterable
from pathlib import Path

import msgspec

from minitron_train.runtime.errors import UserError
from minitron_train.runtime.records import damaged, joined, read_bytes

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

MAX_RECIPE_BYTES = 2**20


class Defaults(typing.TypedDict, total=False):
    """The type of a recipe's defaults list, which Hydra takes for granted."""

    defaults: list[str | typing.Annotated[dict[str, str | list[str] | None], msgspec.Meta(min_length=1)]]


def home() -> Path:
    """Where conf/ and recipes/ are: the checkout, or the package that was installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    return next(base for base in (package.parent, package) if (base / "conf" / "config.yaml").exists())


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
    from hydra.core.config_store import ConfigStore

    from minitron_train.commands.config_files import register, with_current_names
    from minitron_train.config import Config

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


def read_recipe(path: Path) -> "DictConfig":
    """One recipe file, as it stands.

    Raises:
        UserError: it cannot be read, is not YAML, or is no mapping of settings.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
