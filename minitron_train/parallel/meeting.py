"""The meeting of all ranks, with deadlines that name the missing ones: the rendezvous, then the first connections"""

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from minitron_train.runtime.errors import MachineError, error_line
from minitron_train.runtime.heartbeat import Heartbeat
from minitron_train.runtime.launch import World, host_name, rendezvous, whole_number
from minitron_train.runtime.preflight import absent

STARTS = itertools.count()  # meetings of this process: the jobs of a sweep meet one after the other


def meet(world: World, limit_minutes: float) -> Store:
    """Return the store of all ranks, once all of them have arrived at it.

    torchrun's store outlives its attempts (`--max-restarts`). Each attempt and each meeting gets keys of its own.

    Raises:
        UserError: no rendezvous address is set.
        MachineError: the store or some ranks are missing after the limit.
    """
    address, port = rendezvous(os.environ)
    where, limit = f"{address}:{port}", timedelta(minutes=limit_minutes)
    serves = world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun serves it itself
    attempt = whole_number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)
    try:
        shared = TCPStore(
            address, port, world.size, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
        store = PrefixStore(f"attempt_{attempt}/meeting_{next(STARTS)}", shared)
        store.set(f"arrived/{world.rank}", host_name(os.environ))
    except RuntimeError as error:  # DistNetworkError, DistStoreError
        reason = str(error).splitlines()[0]
        raise MachineError(f"no connection to the store of rank 0 at {where} ({reason}); start again") from error
    try:
        store.wait([f"arrived/{rank}" for rank in range(world.size)], limit)
    except RuntimeError as error:
        raise MachineError(
            f"not all ranks are at {where} after {limit_minutes:g} minutes; {missing(store, world.size)}; "
            "check their nodes, or raise parallel.rendezvous_minutes"
        ) from error
    return store


def missing(store: Store, size: int) -> str:
    """The words for the ranks that have not arrived, or for a store that does not answer."""
    try:
        there = [rank for rank in range(size) if store.check([f"arrived/{rank}"])]
    except RuntimeError:
        return "rank 0 has ended; see its message"
    return f"missing ranks: {absent(there, size)}"


@contextlib.contextmanager
def first_connections(store: Store, world: World, limit_minutes: float) -> Iterator[None]:
    """Limit a block that makes process groups and waits for their first collective.

    After the limit the process ends with one line and code 1, because no exception interrupts NCCL's and gloo's calls.
    """
    heartbeat = Heartbeat(world.rank, world.size, cast(Any, store).clone())  # a call that waits blocks its connection

    def expire() -> None:
        what = f"the first collective has not ended after {limit_minutes:g} minutes; {heartbeat.explain()}"
        remedy = "check the network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or raise parallel.connect_minutes"
        print(error_line(MachineError(f"{what}; {remedy}"), world.rank), file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(60 * limit_minutes, expire)
    timer.daemon = True
    timer.start()
    try:
        with heartbeat:
            yield
    finally:
        timer.cancel()
