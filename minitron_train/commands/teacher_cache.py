"""The teacher cache as a stage: what decides its contents, and whether a training may read it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from minitron_train.commands.inputs import stream_inputs
from minitron_train.commands.workspace import Workspace, subset
from minitron_train.config import Config, TeachKind
from minitron_train.planning.precision import recorded
from minitron_train.runtime.errors import UserError
from minitron_train.stages import STARTED, Provenance, Stage, differences, layout, plain, read_provenance

SHARED = ("seed", "data", "seq_length", "late_phase_of")  # settings of a cache that a training must have too


def cache_folder(ws: Workspace) -> Path:
    """teacher.cache, or OUTPUT_DIR/teacher_cache."""
    return Path(ws.config.teacher.cache) if ws.config.teacher.cache else ws.folder / layout.TEACHER_CACHE


def has_cache(ws: Workspace) -> bool:
    """Whether the cache is finished, for whatever length; `distill` checks that it fits."""
    return ws.on_rank0(lambda: read_provenance(cache_folder(ws)) is not None)


def teaching_stage(ws: Workspace) -> Stage:
    """What `teach` reads, and which settings decide what it writes."""
    config = ws.config
    inputs = {"teacher": ws.fingerprint(ws.teacher_folder)} | stream_inputs(ws)
    settings = stream_settings(config) | {"teach": what_is_stored(config)}
    settings["precision"] = recorded(config.distill.teacher_precision or config.train.precision)
    return Stage(
        name="teach",
        folder=cache_folder(ws),
        inputs=inputs,
        settings=settings,
        parent=ws.teacher_folder,
        mode="resumable",
    )


def stream_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the sequences of the stream, apart from its files."""
    data, train = config.data, config.train
    return {
        "seed": config.seed,
        "data": subset(data, "document_attention", "late_fraction"),
        "seq_length": train.seq_length,
        "late_phase_of": train.num_tokens if data.late_fraction else None,
    }


def what_is_stored(config: Config) -> dict[str, Any]:
    """The settings that decide what the cache holds of the sequences, and how many it has."""
    teach, train = config.teach, config.train
    found = {"kind": teach.kind, "num_tokens": teach.num_tokens or train.num_tokens}
    found["global_batch_size"] = train.global_batch_size
    if teach.kind is TeachKind.samples:
        found |= {**subset(teach, "draws", "proposal_exponent"), "temperature": config.distill.temperature}
    return found


def cache_input(ws: Workspace) -> dict[str, str]:
    """What a training reads from the cache, as an input of its stage; collective.

    Raises:
        UserError: the cache is unfinished or damaged, or belongs to another teacher, text or seed.
    """
    wanted = teaching_stage(ws)
    return {"teacher cache": ws.identity(wanted.folder, lambda: identify(wanted))}


def identify(wanted: Stage) -> str:
    """A hash of all that decides the contents of a finished cache, which must be of the wanted stream and teacher.

    Raises:
        UserError: what differs.
    """
    record = finished_record(wanted.folder)
    changes = differences(record["inputs"], wanted.inputs, "input ")
    old, new = ({key: settings.get(key) for key in SHARED} for settings in (record["settings"], plain(wanted.settings)))
    changes += differences(old, new, "")
    if changes:
        raise UserError(
            f"teacher.cache={wanted.folder}: does not belong to this run ({'; '.join(changes)}); restore the setting, or run "
            "`teach` into another folder"
        )
    decided = {"inputs": record["inputs"], "settings": record["settings"]}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def finished_record(folder: Path) -> Provenance:
    """The provenance of a finished cache.

    Raises:
        UserError: there is none.
    """
    record = read_provenance(folder)
    if record is None or record["stage"] != "teach":
        state = "is unfinished" if (folder / STARTED).exists() else "holds no teacher cache"
        raise UserError(f"teacher.cache={folder}: {state}; run `teach` with the same settings first")
    return record
