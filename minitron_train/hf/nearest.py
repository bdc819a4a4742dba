"""The error for a family without a table; it names the supported family whose tensors the folder holds, if there is one."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from minitron_train.arch import ARCHITECTURES, architecture
from minitron_train.arch.table import stacked
from minitron_train.hf.config import shape_from_config, unsupported
from minitron_train.hf.headers import Entry
from minitron_train.hf.locate import has_weights, read_weights
from minitron_train.hf.reasons import bare
from minitron_train.hf.wrapped import wrapper_of
from minitron_train.runtime.errors import UserError

BUFFERS = ".inv_freq"  # end of the names of stored buffers, which are no parameters


def check_family(folder: Path, config: Mapping[str, Any]) -> None:
    """Reject a folder whose model_type is not supported.

    Raises:
        UserError: it is not; the message names the nearest supported family.
    """
    if config.get("model_type") in ARCHITECTURES or wrapper_of(config) is not None:
        return
    error = unsupported(config, str(folder / "config.json"))
    near = nearest_family(folder, config)
    if near is None:
        raise error
    raise UserError(
        f"{error}. Its tensors have the names and sizes of {near}: set model_type={near} if the model's code computes the same"
    )


def nearest_family(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The first supported family that has exactly the folder's tensors, by name and size; None if none has.

    The sizes are those that config.json gives under this family's keys and defaults.
    """
    try:
        tensors = read_weights(folder, dict(config)).tensors if has_weights(folder) else {}
    except UserError:  # the family is the first thing to mend
        return None
    stored = {bare(name): entries[0] for name, entries in tensors.items() if not name.endswith(BUFFERS)}
    return next((name for name in ARCHITECTURES if stored and holds(stored, name, config)), None)


def holds(stored: Mapping[str, Entry], family: str, config: Mapping[str, Any]) -> bool:
    """Whether `stored` are the tensors of a model of this family with this config.json."""
    try:
        shape = shape_from_config({**config, "model_type": family}, "config.json")
    except UserError:
        return False
    table = architecture(family)
    output = bare(table.output_name(shape.untied()))
    untied = shape.untied() if output in stored else shape  # a tied output layer may be stored besides
    wanted = {bare(name): stacked(parts) for name, parts in islice(table.each_stored(untied), len(stored) + 1)}
    return wanted == {name: entry.size for name, entry in stored.items()}
