"""Training over ranks: layouts agree with one process, checkpoints change layout, ranks stop together or name the dead."""

import contextlib
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.distillation.step import Objective
from minitron_train.train import checkpoint_files as files
from minitron_train.train.stragglers import Stragglers
from tests.support.helpers import free_port, run_ranks, start_ranks
from tests.support.training import Interrupted, Material, assert_equal, before_step, interrupt, rows, run, train_here

SPLIT = {"parallel__tensor_model_parallel_size": 2}
HIDDEN = {"distill__hidden_layers": ["embedding/embedding", "1/2"], "distill__ce_weight": 0.5}
VALIDATE = {"eval__every_tokens": 4 * 8 * 32}  # every four steps


@pytest.fixture(scope="module")
def one_rank(training: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What one process logs, plain and with hidden states and labels in the loss."""
    root = tmp_path_factory.mktemp("one")
    run(training, root / "plain")
    run(training, root / "hidden", **HIDDEN)
    return {name: rows(root / name) for name in ("plain", "hidden")}


def test_two_ranks_and_changes_of_layout(
    training: Material, one_rank: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """TP 2 and DP 2 log what one rank logs; TP 2 -> 1 -> 2 and DP 1 -> 2 go on as if nothing had happened."""
    split, data = tmp_path / "tp2_to_1_to_2", tmp_path / "dp1_to_2"
    with before_step(5, interrupt), pytest.raises(Interrupted):
        run(training, data)
    run_ranks(
        train_here,
        2,
        [
            (training, tmp_path / "tp2", SPLIT),
            (training, tmp_path / "tp2_sp_hidden", SPLIT | HIDDEN | {"parallel__sequence_parallel": True}),
            (training, tmp_path / "dp2", {}),
            (training, tmp_path / "dp2_hidden", HIDDEN),
            (training, data, {}),
            (training, split, SPLIT | {"stop_in": 4}),
        ],
    )
    with before_step(7, interrupt), pytest.raises(Interrupted):
        run(training, split)
    assert files.finished(split / "checkpoints")[0].name == "step_00000006"
    run_ranks(train_here, 2, [(training, split, SPLIT)])
    for folder in tmp_path.iterdir():
        assert_equal(folder, one_rank["hidden" if "hidden" in folder.name else "plain"])


def test_four_ranks(training: Material, one_rank: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """TP 2 x DP 2 with sequence parallelism; a resumed half is bit-equal to the whole run in the same layout."""
    layout = SPLIT | {"parallel__sequence_parallel": True}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    runs = [(training, whole, layout), (training, resumed, layout | {"stop_in": 5}), (training, resumed, layout)]
    run_ranks(train_here, 4, runs)
    assert_equal(whole, one_rank["plain"])
    assert rows(resumed) == rows(whole)


def signalled(rank: int, world_size: int, material: Material, folder: Path) -> int | None:
    """Only the last rank gets the signal."""

    def send(_: Any) -> None:
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    with before_step(4, send):
        try:
            run(material, folder)
        except SystemExit as ended:
            return ended.code
    return None


def test_a_signal_to_one_rank_stops_all_at_the_same_step(training: Material, tmp_path: Path) -> None:
    assert run_ranks(signalled, 2, training, tmp_path) == [0, 0]
    assert files.finished(tmp_path / "checkpoints")[0].name == "step_00000004"
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def signalled_in_validation(
    rank: int, world_size: int, material: Material, folder: Path, layout: dict[str, Any]
) -> int:
    """Rank 1 gets the signal in the first batch of a validation; the number of batches that this rank computes."""
    num_batches = 0
    original = Objective.logit_loss

    def counted(self: Objective, *arguments: Any) -> Any:
        nonlocal num_batches
        if not torch.is_grad_enabled():
            num_batches += 1
            if rank == 1 and num_batches == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *arguments)

    Objective.logit_loss = counted
    with contextlib.suppress(SystemExit):
        run(material, folder, **VALIDATE, **layout)
        return -1
    return num_batches


@pytest.mark.parametrize(("layout", "batches"), [({}, [2, 1]), (SPLIT, [1, 1])])
def test_a_signal_ends_a_validation_after_a_batch(
    training: Material, tmp_path: Path, layout: dict[str, Any], batches: list[int]
) -> None:
    """TP ranks end at the same batch; a DP rank without the signal ends its share. The validation is repeated."""
    assert run_ranks(signalled_in_validation, 2, training, tmp_path / "stopped", layout) == batches
    assert [row["step"] for row in rows(tmp_path / "stopped")] == [1, 2, 3]
    assert files.finished(tmp_path / "stopped" / "checkpoints")[0].name == "step_00000004"
    again, whole = ((training, tmp_path / name, layout | VALIDATE) for name in ("stopped", "whole"))
    run_ranks(train_here, 2, [again, whole])
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def straggling(rank: int, world_size: int, material: Material, folder: Path) -> tuple[list[str], int]:
    """Time runs a thousand times faster on rank 1; the lines about stragglers, and the number of readings of the clock."""
    num_readings = 0

    def fast(self: Stragglers) -> float:
        nonlocal num_readings
        num_readings += 1
        return time.perf_counter() * (1000 if rank == 1 else 1)

    Stragglers.now = fast
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("minitron_train").addHandler(handler)
    run(material, folder, train__straggler_every_steps=3)
    return [line for line in lines if "slowest" in line], num_readings


def test_the_slowest_rank_is_named(training: Material, tmp_path: Path) -> None:
    """Every three of eight steps; the other steps do not even read the clock."""
    (lines, num_readings), (other, _) = run_ranks(straggling, 2, training, tmp_path)
    assert [line.split(": ")[:2] for line in lines] == [
        [f"step {step}", f"slowest rank 1 on {socket.gethostname()}"] for step in (3, 6)
    ]
    assert all("% above the median" in line for line in lines)
    assert not other and num_readings == 2 * 4


def left_behind(
    rank: int, world_size: int, material: Material, folder: Path, sent: signal.Signals
) -> tuple[str, float]:
    """The last rank dies, or stops, without a word; what the others say, and after how many seconds."""
    fell_silent_s = [0.0]

    def fall_silent(_: Any) -> None:
        fell_silent_s[0] = time.monotonic()
        if rank == world_size - 1:
            os.kill(os.getpid(), sent)

    with before_step(4, fall_silent):
        try:
            run(material, folder, **SPLIT, parallel__timeout_minutes=0.25)
        except RuntimeError as error:
            return str(error), time.monotonic() - fell_silent_s[0]
    return "", 0.0


@pytest.mark.races
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_rank_is_named(training: Material, tmp_path: Path, sent: signal.Signals) -> None:
    workers, results = start_ranks(left_behind, 2, free_port(), (training, tmp_path, sent))
    try:
        rank, answer, trace = results.get()
    finally:
        workers[-1].kill()
        for worker in workers:
            worker.join(timeout=10)
    assert (rank, trace) == (0, None)
    said, seconds = answer
    host = socket.gethostname()
    assert said.startswith(f"rank 0, step 4: rank 1 on {host} has ended or hangs, last heartbeat at step")
    assert seconds < 60
