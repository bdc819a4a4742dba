"""One step of the chain as a value: its folder, what decides its result, and how it differs from a finished one."""

import contextlib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from minitron_train.config.renamed import current_settings
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import PARTIAL, disk_errors
from minitron_train.runtime.masking import mask_credentials
from minitron_train.stages.provenance import PROVENANCE, STARTED, Provenance, Started, read_provenance

DATA = "data "  # prefix of the labels of inputs that describe the blend (see data.sources.identity)
SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
SHA256_OF_NOTHING = hashlib.sha256().hexdigest()  # the digest of an empty folder's listing

State = Literal["missing", "finished", "stale", "damaged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of the chain.

    Attributes:
        inputs: fingerprint of everything that the stage reads, by label.
        settings: the part of the configuration that decides the result (not where it runs, nor how it is logged).
        mode: `atomic`: written into a scratch folder, which replaces the old one at the end. `resumable`: updated in
            place across runs (training), restarted only with force=true. `self_managed`: the work writes its folder
            atomically itself (downloads).
        parent: the folder that this one was made from.
        record: name of the provenance file.
        notes: more lines for `describe`, such as which shapes are kept.
    """

    name: str
    folder: Path
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    parent: Path | None = None
    mode: Literal["atomic", "resumable", "self_managed"] = "atomic"
    record: str = PROVENANCE
    notes: tuple[str, ...] = field(default=())

    def state(self) -> tuple[State, str]:
        """The state; for `stale` also what has changed, for `damaged` what is wrong with the record."""
        try:
            old = read_provenance(self.folder, self.record)
        except UserError as error:
            return "damaged", str(error)
        if old is None:
            return "missing", ""
        changes = changes_since(old, self)
        return ("stale", "; ".join(changes)) if changes else ("finished", "")

    @property
    def lock(self) -> Path:
        """The lock file. It lies next to the folder, because the folder may be replaced."""
        return self.folder.with_name(f".{self.folder.name}.{self.record.removesuffix(PROVENANCE)}lock")

    def describe(self) -> list[str]:
        """Lines for dry_run.

        Raises:
            UserError: a run would refuse the folder (see `refuse_foreign`).
        """
        refuse_foreign(self)
        state, why = self.state()
        lines = [f"{self.name}: {state}{f' ({why})' if why else ''}"]
        found = {label: f"{label} {short(value)}" for label, value in self.inputs.items()}
        blend = [text.removeprefix(DATA) for label, text in found.items() if label.startswith(DATA)]
        lines += [f"  reads   {text}" for label, text in found.items() if not label.startswith(DATA)]
        lines += [f"  reads   data: {', '.join(blend)}"] if blend else []
        return [*lines, f"  writes  {self.folder}", *(f"  {note}" for note in self.notes)]


def refuse_foreign(stage: Stage) -> None:
    """Refuse a folder that this stage did not make, because a stage may empty its folder. Downloads check for themselves.

    Raises:
        UserError: the folder holds files but no record of this program, or the result of another stage.
    """
    folder = stage.folder
    if stage.mode == "self_managed":
        return
    with disk_errors(folder):
        present = contents(folder)
        ours = any((folder / mark).is_file() for mark in (stage.record, STARTED))
    other = None
    with contextlib.suppress(UserError):  # a damaged record names no stage; force=true replaces it
        other = read_provenance(folder, stage.record)
    if other is not None and other["stage"] != stage.name:
        raise UserError(
            f"{stage.name}: {folder} holds the result of another stage ({other['stage']}); choose another output_dir (export: "
            "another export.path)"
        )
    if present and not ours:
        raise UserError(
            f"{stage.name}: {folder} holds files that this program did not write (such as {present[0]}), and a stage may "
            "delete what its folder holds; move them, or choose another output_dir (export: another export.path)"
        )


def contents(folder: Path) -> list[str]:
    """Names in a stage's folder, without the scratch files of killed runs."""
    return sorted(path.name for path in folder.iterdir() if PARTIAL not in path.name) if folder.exists() else []


def changes_since(record: Started | Provenance, stage: Stage) -> list[str]:
    """How a stage differs from the one that a record describes."""
    inputs = differences(record["inputs"], stage.inputs, "input ")
    return inputs + differences(current_settings(record["settings"], None), plain(stage.settings), "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], label: str) -> list[str]:
    """What changed between two flat or nested mappings: "student.hidden_size was 504, is 480"."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += differences(before, after, f"{label}{key}.")
        elif before != after:
            changes.append(f"{label}{key} was {short(before)}, is {short(after)}")
    return changes


def short(value: Any) -> str:
    """A value for a message: every sha256 in it is cut to 12 digits; the sha256 of no bytes becomes `nothing`."""
    return SHA256.sub(lambda found: "nothing" if found[0] == SHA256_OF_NOTHING else found[0][:12], str(value))


def plain(value: Any) -> Any:
    """JSON-able copy for a record: enums by name, paths and other objects as text, credentials masked."""
    if isinstance(value, Mapping):
        return {mask_credentials(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int | float | bool) or value is None:
        return value
    return mask_credentials(value.name if isinstance(value, Enum) else str(value))
