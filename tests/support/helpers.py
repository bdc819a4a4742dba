"""Runs a function on several ranks: gloo processes on this machine."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 180.0
PORTS_TRIED = 3
PRELOADED = [
    "minitron_train.train.run",
    "minitron_train.evaluation.run",
    "minitron_train.pruning.prune",
    "lm_eval.evaluator",
]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `function(rank, world_size, *args)` in processes with torchrun's environment variables.

    `function` must be importable by name, and starts torch.distributed itself (parallel.groups.start reads the environment).

    Returns:
        What each rank returned.

    Raises:
        AssertionError: a rank failed (its traceback is in the message) or hung.
    """
    for _ in range(PORTS_TRIED):
        try:
            return run_once(function, world_size, args)
        except AssertionError as error:
            if "EADDRINUSE" not in str(error):
                raise
    raise AssertionError("no free port")


def run_once(function: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> list[Any]:
    """Try once, on a port that is free now; another process may take it before the ranks do."""
    workers, results = start_ranks(function, world_size, free_port(), args)
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            rank, answer, trace = results.get(timeout=TIMEOUT_S)
            assert trace is None, f"rank {rank} failed:\n{trace}"
            answers[rank] = answer
    finally:
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
    return [answers[rank] for rank in range(world_size)]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    function: Callable[..., Any], world_size: int, port: int, args: tuple[Any, ...]
) -> tuple[list[Any], Any]:
    """Start the ranks. Returns their processes, and the queue into which each puts (rank, answer, traceback)."""
    context = mp.get_context("forkserver")  # each rank is a fork of a process that has imported PRELOADED
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    environment = dict(os.environ)  # the fork server has the environment of its own start
    workers = [
        context.Process(target=work, args=(function, rank, world_size, port, results, args, environment), daemon=True)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    return workers, results


def work(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    """Be one rank: put what the function returns, or its traceback, into the queue."""
    os.environ |= environment | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        results.put((rank, function(rank, world_size, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
