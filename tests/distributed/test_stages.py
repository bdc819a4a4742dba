"""Stages on two ranks: the first one's work may outlast a collective, and its failure is everyone's."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from minitron_train.config import ParallelConfig
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World, read_world
from minitron_train.stages import Invocation, Stage, run_stage
from tests.support.helpers import run_ranks

TIMEOUT_S = 1.0  # of a collective


def stages_on(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Slow work, then what is refused on rank 0 alone; what this rank met, by name."""
    from minitron_train.parallel.groups import start

    met: dict[str, Any] = {}
    with start(ParallelConfig(), read_world(), seed=1) as groups:
        _set_pg_timeout(timedelta(seconds=TIMEOUT_S))

        def slow(target: Path) -> Mapping[str, Any]:
            def write() -> dict[str, int]:
                time.sleep(2 * TIMEOUT_S)
                (target / "result").write_text("whole")
                return {"rank": rank}

            return groups.on_rank0(write)

        def attempt(name: str, work: Callable[[Path], Mapping[str, Any]], **changes: Any) -> None:
            stage = Stage(**{"name": name, "folder": folder / name, "inputs": {}, "settings": {}, **changes})
            try:
                met[name] = run_stage(stage, Invocation([], {}), work, force=False, on_rank0=groups.on_rank0)
            except (UserError, RuntimeError) as error:
                met[name] = f"{type(error).__name__}: {error}"

        def refuse() -> dict[str, Any]:
            raise UserError("no such wheel")

        def fail() -> dict[str, Any]:
            raise KeyError("a bug")

        attempt("slow", slow)
        attempt("refused", lambda _: groups.on_rank0(refuse))
        attempt("grown", lambda _: {}, mode="resumable", folder=folder / "file" / "below")
        met["share"] = groups.on_rank0(lambda: {"path": folder / str(rank)})
        if rank:
            attempt("broken", lambda _: groups.on_rank0(fail))
        else:
            with pytest.raises(KeyError):
                attempt("broken", lambda _: groups.on_rank0(fail))
    return met


def test_the_first_ranks_work_and_failures_are_everyones(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_ranks(stages_on, 2, tmp_path)
    assert first["slow"] is second["slow"] is True and (tmp_path / "slow" / "result").read_text() == "whole"
    assert first["refused"] == second["refused"] == "UserError: no such wheel"
    assert first["grown"] == second["grown"] and first["grown"].startswith("UserError: cannot write ")
    assert first["share"] == second["share"] == {"path": tmp_path / "0"}
    assert second["broken"] == "RuntimeError: the first rank has failed: see its message"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "slow"]


def test_a_failure_leaves_the_groups_to_the_process_end() -> None:
    """Their destruction waits for collectives that the other ranks are in."""
    from minitron_train.parallel.groups import start

    with pytest.raises(UserError), start(ParallelConfig(), World(), seed=1):
        raise UserError("alone")
    assert dist.is_initialized()
    with start(ParallelConfig(), World(), seed=1):  # the next job of a sweep
        pass
    assert not dist.is_initialized()
