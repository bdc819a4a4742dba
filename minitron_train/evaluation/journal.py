"""Answers of an evaluation that is under way, on disk, so that an interrupted one goes on where it stopped."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import torch.distributed as dist

from minitron_train.parallel.groups import Groups
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_text, disk_errors
from minitron_train.runtime.records import read_lines, set_aside

Answer = tuple[float, bool] | str  # of a scored continuation: log-likelihood, is greedy; or a generated text


class Entry(TypedDict):
    """One line of a journal."""

    fingerprint: str
    answers: dict[str, Answer]


class Journal:
    """Request key -> answer, appended after every forward pass; one file per data-parallel rank.

    What another model, precision or lm-eval has answered is not read: each line carries the run's fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: str, groups: Groups) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.writes = groups.tp_rank == 0
        self.file = folder / f"rank{groups.dp_rank}.jsonl"
        self.answers: dict[str, Answer] = {}
        if groups.is_first:
            with disk_errors(folder):
                self._recover()
        if groups.world_size > 1:  # all ranks must agree on what is left to do
            shared = [self.answers]
            dist.broadcast_object_list(shared, src=0)
            self.answers = shared[0]
        self.num_found = len(self.answers)

    def _recover(self) -> None:
        """Take over the answers on disk; a damaged file, and what is no file or folder, is set aside."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            say(f"{self.folder}: is not a folder; kept as {set_aside(self.folder).name}, all rows are evaluated")
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for entry in whole_entries(path):
                if entry["fingerprint"] == self.fingerprint:
                    self.answers |= entry["answers"]

    def known(self, kind: type) -> dict[str, Any]:
        """The answers of one kind: tuple (scores) or str (texts)."""
        return {key: answer for key, answer in self.answers.items() if isinstance(answer, kind)}

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append answers that this rank has just found."""
        self.answers |= answers
        if self.writes:
            with disk_errors(self.file):
                self.folder.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"fingerprint": self.fingerprint, "answers": dict(answers)}) + "\n")

    def remove(self) -> None:
        """Delete the files: the evaluation is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


ENTRY = msgspec.json.Decoder(Entry)


def whole_entries(path: Path) -> list[Entry]:
    """The whole lines of one file, which from now on has no others; what was damaged is kept under another name."""
    try:
        found = read_lines(path, ENTRY.decode)
    except (UserError, FileNotFoundError) as error:  # the latter: a link to nowhere
        say(f"{error}; kept as {set_aside(path).name}, and its rows are evaluated again")
        return []
    for number, why in list(found.damaged.items())[:1]:
        where = f"{path}: {len(found.damaged)} damaged lines, the first is line {number} ({why})"
        say(f"{where}; kept as {set_aside(path).name}, and their rows are evaluated again")
    if found.damaged or found.cut_off:  # the next answer must begin a line of its own
        atomic_write_text(path, "".join(json.dumps(entry) + "\n" for entry in found.values))
    return found.values


def key_of(*parts: Any) -> str:
    """A request's key: of its token ids and whatever else decides the answer."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
