"""Answers of an evaluation that is under way, on disk, so that an interrupted one goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minitron_train.files import disk_errors
from minitron_train.parallel.groups import Groups


class Journal:
    """Request key -> answer, appended after every forward pass; one file per data-parallel rank.

    What another model, precision or lm-eval has answered is not read: each line carries the run's fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: str, groups: Groups) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.writes = groups.tp_rank == 0
        self.file = folder / f"rank{groups.dp_rank}.jsonl"
        self.answers: dict[str, Any] = {}
        if groups.is_first and folder.exists():
            for path in sorted(folder.glob("rank*.jsonl")):
                self.answers |= self._read(path)
        if groups.world_size > 1:  # all ranks must agree on what is left to do
            shared = [self.answers]
            dist.broadcast_object_list(shared, src=0)
            self.answers = shared[0]
        self.num_found = len(self.answers)

    def _read(self, path: Path) -> dict[str, Any]:
        """Answers of this fingerprint; the line that a kill has cut off is dropped."""
        found: dict[str, Any] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["fingerprint"] == self.fingerprint:
                found |= entry["answers"]
        return found

    def add(self, answers: Mapping[str, Any]) -> None:
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


def key_of(*parts: Any) -> str:
    """A request's key: of its token ids and whatever else decides the answer."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
