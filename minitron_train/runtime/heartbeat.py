"""Heartbeats of all ranks in the rendezvous store, so that a failed collective can name the rank that caused it."""

import os
import threading
import time
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from minitron_train.runtime.launch import host_name

INTERVAL_S = 1.0


class Heartbeat:
    """Context manager: a thread writes `BEATS STEP HOST` for this rank every second. With one rank it does nothing.

    Args:
        store: the rendezvous store; by default that of torch.distributed's default group.
    """

    def __init__(self, rank: int, world_size: int, store: Any = None) -> None:
        self.rank, self.world_size, self.step = rank, world_size, 0
        self.ended = threading.Event()
        self.store: Any = store or (_get_default_store() if world_size > 1 else None)

    def __enter__(self) -> "Heartbeat":
        if self.store is not None:
            threading.Thread(target=self._beat, args=(self.store.clone(),), name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def _beat(self, store: Any) -> None:
        beats, host = 0, host_name(os.environ)
        while not self.ended.wait(INTERVAL_S if beats else 0):
            beats += 1
            try:
                store.set(f"heartbeat/{self.rank}", f"{beats} {self.step} {host}")
            except RuntimeError:  # the store's process has ended; the next collective reports it
                return

    def explain(self) -> str:
        """After a failed collective: which ranks have stopped, and at which step. Takes a few seconds, without collectives."""
        if self.store is None:
            return "there is no other rank"
        try:
            before = self._read(self.store)
            time.sleep(3 * INTERVAL_S)
            after = self._read(self.store)
        except RuntimeError:
            return "the rendezvous store does not answer: rank 0, or the launcher that runs it, has ended"
        silent = [rank for rank in after if before[rank] == after[rank] and rank != self.rank]
        if not silent:
            if len({beat.split()[1] for beat in after.values()}) == 1:
                return f"all ranks are alive, at step {self.step}"
            steps = ", ".join(f"rank {rank} {beat.split()[1]}" for rank, beat in after.items())
            return f"all ranks are alive; their steps: {steps}"
        return "; ".join(lost(rank, *after[rank].split()[1:]) for rank in silent)

    def host_of(self, rank: int) -> str:
        """The host of a rank, as its heartbeat names it."""
        return self._read(self.store)[rank].split()[2]

    def _read(self, store: Any) -> dict[int, str]:
        keys = {rank: f"heartbeat/{rank}" for rank in range(self.world_size)}
        return {rank: store.get(key).decode() if store.check([key]) else "0 0" for rank, key in keys.items()}


def lost(rank: int, step: str, *host: str) -> str:
    """The words for a rank that has stopped. slurm/common.sh reads the host from them."""
    where = f"rank {rank} on {host[0]}" if host else f"rank {rank}"
    return f"{where} has ended or hangs, last heartbeat at step {step}"
