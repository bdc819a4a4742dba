"""Recipes: flat YAML files in recipes/, and where this program keeps them and conf/."""

import typing
from collections.abc import Iterable, Mapping
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

    A damaged file is refused if `arguments` name it, and ignored otherwise: the working directory's recipes/ may belong to
    another program. Old keys are reported only for the named recipes and for those that they extend.

    Raises:
        UserError: a named recipe is damaged, or gives both names of a key.
    """
    from hydra.core.config_store import ConfigStore

    from minitron_train.commands.config_files import register, with_current_names
    from minitron_train.config import Config

    asked = {name for word in arguments if word.startswith("+recipe=") for name in word.split("=", 1)[1].split(",")}
    register()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    paths, nodes = recipes(), {}
    for stem, path in paths.items():
        try:
            nodes[stem] = read_recipe(path)
        except UserError:
            if stem in asked:
                raise
    used = with_bases(asked, nodes)
    for stem, node in nodes.items():
        node = with_current_names(node, str(paths[stem]) if stem in used else None)
        node.setdefault("name", stem)
        store.store(group="recipe", name=stem, node=node, package="_global_")


def with_bases(names: Iterable[str], nodes: Mapping[str, "DictConfig"]) -> set[str]:
    """The recipes of these names, and all recipes that their defaults lists name."""
    found: set[str] = set()
    waiting = [name for name in names if name in nodes]
    while waiting:
        found.add(name := waiting.pop())
        bases = (base for base in nodes[name].get("defaults", []) if isinstance(base, str))
        waiting += [base for base in bases if base in nodes and base not in found]
    return found


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
