"""The meeting of all ranks: whoever is missing after a deadline is named in one line."""

import itertools
import os
import socket
import subprocess
import sys
import textwrap

import pytest
from torch._C._distributed_c10d import TCPStore

from minitron_train.parallel import meeting
from minitron_train.parallel.meeting import meet
from minitron_train.runtime.errors import MachineError
from minitron_train.runtime.launch import World
from tests.support.helpers import free_port

NEVER = """
    import os, signal, time
    from minitron_train.config import ParallelConfig
    from minitron_train.parallel import groups
    from minitron_train.runtime.launch import read_world

    if os.environ["RANK"] == "1":
        groups.dist.{function} = lambda *_, **given: {action}
    with groups.start(ParallelConfig(connect_minutes=0.1), read_world(), seed=1):
        print("connected")
"""


def test_ranks_that_do_not_arrive_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(MachineError, match=rf"127\.0\.0\.1:{port} after 0\.01 minutes; missing ranks: 1, 2; check"):
        meet(World(0, 3), 0.01)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(MachineError, match=r"no connection to the store of rank 0 at 127\.0\.0\.1:"):
        meet(World(1, 3), 0.01)


def test_a_meeting_reads_no_keys_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store after a failed attempt: with the old keys, ranks would connect to ended processes."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(meeting, "STARTS", itertools.count())
    meet(World(0, 1), 0.1).set("address of rank 0", "ended")
    assert not meet(World(0, 1), 0.1).check(["address of rank 0"])  # the next job of a sweep
    monkeypatch.setattr(meeting, "STARTS", itertools.count())  # a new process
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not meet(World(0, 1), 0.1).check(["address of rank 0"])


@pytest.mark.races
@pytest.mark.parametrize(
    ("function", "action", "reason"),
    [
        (
            "init_process_group",
            "(given['store'].wait(['heartbeat/1']), os.kill(os.getpid(), signal.SIGSTOP))",
            "rank 1 on HOST has ended or hangs, last heartbeat at step 0",
        ),
        ("all_reduce", "time.sleep(60)", "all ranks are alive, at step 0"),
    ],
)
def test_a_rank_that_does_not_connect_is_named(function: str, action: str, reason: str) -> None:
    """Rank 0 waits inside a call that no exception can interrupt."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(NEVER.format(function=function, action=action))],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        output, errors = started[0].communicate()
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert started[0].returncode == 1 and not output
    last = errors.splitlines()[-1]
    reason = reason.replace("HOST", socket.gethostname())
    assert last.startswith(f"error: the first collective has not ended after 0.1 minutes; {reason}; check the network")
    assert last.endswith("or raise parallel.connect_minutes (rank 0)")
