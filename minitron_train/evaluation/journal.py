"""The journal of an evaluation: answers on disk, from which an interrupted evaluation resumes."""

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

Answer = tuple[float, bool] | str  # (log-likelihood, is greedy) of a scored continuation, or a generated text


class Entry(TypedDict):
    """One line of a journal file."""

    fingerprint: str
    answers: dict[str, Answer]


class Journal:
    """Maps request keys to answers and appends them to a file per data-parallel rank after each forward pass.

    Each line has the fingerprint of model, precision and lm-eval version. Answers with another fingerprint are not used.
    """

    def __init__(self, folder: Path, fingerprint: str, groups: Groups) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.writes = groups.tp_rank == 0
        self.file = folder / f"rank{groups.dp_rank}.jsonl"
        self.answers: dict[str, Answer] = {}
        if groups.is_first:
            with disk_errors(folder):
                self._recover()
        if groups.world_size > 1:  # all ranks must agree on the unanswered requests
            shared = [self.answers]
            dist.broadcast_object_list(shared, src=0)
            self.answers = shared[0]
        self.num_found = len(self.answers)

    def _recover(self) -> None:
        """Load the answers on disk. Damaged files are renamed and kept, as is anything that is not a file or folder."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            say(f"{self.folder}: is not a folder; kept as {set_aside(self.folder).name}, evaluating all rows")
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for entry in whole_entries(path):
                if entry["fingerprint"] == self.fingerprint:
                    self.answers |= entry["answers"]

    def known(self, kind: type) -> dict[str, Any]:
        """Return the answers of one type: tuple (scores) or str (texts)."""
        return {key: answer for key, answer in self.answers.items() if isinstance(answer, kind)}

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append new answers of this rank."""
        self.answers |= answers
        if self.writes:
            with disk_errors(self.file):
                self.folder.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"fingerprint": self.fingerprint, "answers": dict(answers)}) + "\n")

    def remove(self) -> None:
        """Delete the files after a complete evaluation."""
        shutil.rmtree(self.folder, ignore_errors=True)


ENTRY = msgspec.json.Decoder(Entry)


def whole_entries(path: Path) -> list[Entry]:
    """Return the valid lines of one file and rewrite it without others. A damaged file is kept under another name."""
    try:
        found = read_lines(path, ENTRY.decode)
    except (UserError, FileNotFoundError) as error:  # FileNotFoundError: a broken link
        say(f"{error}; kept as {set_aside(path).name}, evaluating its rows again")
        return []
    for number, why in list(found.damaged.items())[:1]:
        where = f"{path}: {len(found.damaged)} damaged lines, the first is line {number} ({why})"
        say(f"{where}; kept as {set_aside(path).name}, evaluating these rows again")
    if found.damaged or found.cut_off:  # the next answer must start on a new line
        atomic_write_text(path, "".join(json.dumps(entry) + "\n" for entry in found.values))
    return found.values


def key_of(*parts: Any) -> str:
    """Return the key of a request: a hash of its token ids and of everything else that determines the answer."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
