"""The start of a training on two ranks: who reads the data and the weights, and what the other rank gets."""

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from minitron_train.data import held_out, tokenizers
from minitron_train.data.held_out import HELD_OUT, kept_tokens
from minitron_train.data.stream import TokenStream
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import read_world
from tests.support.helpers import run_ranks
from tests.support.training import SEQ_LENGTH, Interrupted, Material, make_config, run


def called_by(file: str) -> bool:
    """Whether a function of this file is on the stack. The inventory reads the first bytes of a file to tell its format."""
    frame = sys._getframe(1)
    while frame and Path(frame.f_code.co_filename).name != file:
        frame = frame.f_back
    return frame is not None


def begin(rank: int, world_size: int, material: Material, folder: Path) -> Counter:
    """Start a training up to its first batch. Returns how often it has opened, searched and read."""
    counts: Counter = Counter()

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(material.corpus) and not called_by("inventory.py"):
            counts["corpus opened"] += 1

    def counted(what: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counts[what] += 1
            return function(*arguments)

        return call

    from minitron_train.hf import rows

    sys.addaudithook(opened)
    with (
        mock.patch.object(held_out, "take_held_out", counted("held-out searched", held_out.take_held_out)),
        mock.patch.object(rows, "read_at", counted("tensors read", rows.read_at)),
        mock.patch.object(TokenStream, "next_batch", side_effect=Interrupted),
        contextlib.suppress(Interrupted),
    ):
        run(material, folder)
    return counts


def test_rank_0_reads_for_all(training: Material, tmp_path: Path) -> None:
    """Rank 1 opens no file to identify the data or to find held-out tokens, and reads no weights. The second start searches
    no held-out tokens.
    """
    for num_searches in (1, 0):
        first, other = run_ranks(begin, 2, training, tmp_path)
        assert first["corpus opened"] and first["held-out searched"] == num_searches and first["tensors read"] > 10
        assert not other


def tokens_and_weights(rank: int, world_size: int, material: Material, folder: Path) -> tuple[Any, ...]:
    """What a rank validates on and begins with."""
    from minitron_train.hf import HFFolder
    from minitron_train.parallel.groups import start
    from minitron_train.train.assemble import assemble

    config = make_config(material)
    with start(config.parallel, read_world(), config.seed) as groups, contextlib.ExitStack() as stack:
        files = HFFolder(material.student), HFFolder(material.teacher)
        trainer = assemble(config, groups, *files, folder, stack)
        assert trainer.objective.teacher is not None
        models = (trainer.student, trainer.objective.teacher)
        weights = [{name: value.tolist() for name, value in model.named_parameters()} for model in models]
        return trainer.validation.tokens.tolist(), trainer.stream.stream.known, weights


def test_both_ranks_begin_with_what_one_rank_finds(training: Material, tmp_path: Path) -> None:
    """Held-out tokens, fingerprints and weights are bit-equal to those of one process, from the search and from the file."""
    alone = tokens_and_weights(0, 1, training, tmp_path / "alone")
    for _ in range(2):
        assert run_ranks(tokens_and_weights, 2, training, tmp_path / "both") == [alone, alone]


def test_a_changed_or_damaged_file_of_held_out_tokens_is_made_again(
    training: Material, tmp_path: Path, capsys: Any
) -> None:
    wanted = tokens_and_weights(0, 1, training, tmp_path)[0]
    path = tmp_path / HELD_OUT
    good = path.read_bytes()
    tokenizer, config = tokenizers.load(training.student), make_config(training)
    for damaged in (good[:-8] + bytes(8), good[: len(good) // 2], b""):
        path.write_bytes(damaged)
        assert kept_tokens(tmp_path, config.data, tokenizer, SEQ_LENGTH, config.seed).tolist() == wanted
        assert "held-out tokens are searched again" in capsys.readouterr().out
        assert kept_tokens(tmp_path, config.data, tokenizer, SEQ_LENGTH, config.seed).tolist() == wanted
        assert not capsys.readouterr().out
    path.unlink()
    os.mkfifo(path)  # nobody writes to it: opening it would wait for ever
    with pytest.raises(UserError, match=r"is not a regular file; remove it"):
        kept_tokens(tmp_path, config.data, tokenizer, SEQ_LENGTH, config.seed)
    path.unlink()
    config.data.validation_tokens //= 2
    fewer = kept_tokens(tmp_path, config.data, tokenizer, SEQ_LENGTH, config.seed).tolist()
    assert fewer == wanted[: len(fewer)] and len(fewer) < len(wanted)


def damaged_read(rank: int, world_size: int, material: Material, folder: Path) -> str:
    """The line with which a rank ends if rank 0 cannot read a tensor of the student."""
    from minitron_train.hf import rows

    read_at, calls = rows.read_at, []

    def fail(file: int, entry: Any, *arguments: Any) -> None:
        calls.append(entry)
        if len(calls) == 3:
            raise UserError(f"{entry.file.name}: ends inside tensor {entry.name}; it was changed while it was read")
        read_at(file, entry, *arguments)

    with mock.patch.object(rows, "read_at", fail):
        try:
            run(material, folder)
        except UserError as error:
            return str(error)
    return ""


def test_a_rank_that_cannot_read_ends_all(training: Material, tmp_path: Path) -> None:
    line, other = run_ranks(damaged_read, 2, training, tmp_path)
    assert line == other and "ends inside tensor" in line
