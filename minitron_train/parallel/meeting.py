"""All ranks meet before torch is loaded: is everyone there, with the same software, the same folder, a way to the others?

Rank 0 listens where torch.distributed's rendezvous will be; then each rank calls the next one, so that every node has
been connected to and from. A missing or unreachable rank is named within DEADLINE_S, instead of a hanging first collective.
"""

import importlib.metadata
import json
import platform
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from minitron_train.errors import UserError
from minitron_train.parallel.launch import World

DEADLINE_S = 90  # for all ranks together; job steps start within seconds of each other
PACKAGES = ("minitron_train", "torch", "megatron-core", "transformers")  # must be the same on all ranks

Card = Mapping[str, Any]  # a rank's report: rank, host, port, versions, complaints


def meet(complaints: list[str], folder: Path, world: World, environ: Mapping[str, str]) -> list[str]:
    """Bring the complaints of all ranks together, and add those about software, shared folder and network.

    Args:
        complaints: this rank's own.
        folder: exists for rank 0, which puts a file into it that the others must see.
        environ: MASTER_ADDR and MASTER_PORT of the rendezvous.

    Returns:
        On rank 0 everyone's complaints, elsewhere a reference to them; empty everywhere when there are none.

    Raises:
        UserError: a rank did not come, or could not reach rank 0.
    """
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    arrived = [world.rank]

    def who_is_missing() -> str:
        if world.is_first and len(arrived) < world.size:
            return f"{DEADLINE_S} s: ranks {absent(arrived, world.size)} did not reach {host}:{port}; is a firewall between?"
        return (
            f"{DEADLINE_S} s: {host_name(environ)} could not meet the others at {host}:{port}; is a firewall between?"
        )

    with listen(0) as own, deadline(who_is_missing):
        here = {"rank": world.rank, "host": host_name(environ), "port": own.address[1]}
        card = {**here, "versions": versions(), "complaints": complaints}
        if not world.is_first:
            return report(card, own, folder, (host, port))
        try:
            listener = listen(port)
        except OSError as error:
            raise UserError(f"MASTER_PORT={port}: {error.strerror} on {host}; set another one") from error
        with listener:
            return gather(card, own, listener, folder, world.size, arrived)


def report(card: Card, own: Listener, folder: Path, first: tuple[str, int]) -> list[str]:
    """The side of the ranks above 0."""
    try:
        connection = call(first)
    except OSError as error:
        raise UserError(f"{card['host']} cannot reach {first[0]}:{first[1]}: {error.strerror or error}") from error
    with connection:
        send(connection, card)
        notice = receive(connection)
        seen = notice["proof"] is None or Path(notice["proof"]).exists()
        found = (
            [] if seen else [f"{card['host']}: does not see {folder} of rank 0; output_dir must be on a shared disk"]
        )
        send(connection, found + call_neighbour(own, notice["ranks"], card["rank"]))
        return ["see the message of rank 0"] if receive(connection) else []


def gather(card: Card, own: Listener, listener: Listener, folder: Path, size: int, arrived: list[int]) -> list[str]:
    """Rank 0's side. `arrived` is filled as the ranks come."""
    cards, others, proof = {0: card}, {}, folder / f".meeting-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        while len(cards) < size:
            connection = stack.enter_context(listener.accept())
            theirs = receive(connection)
            cards[theirs["rank"]], others[theirs["rank"]] = theirs, connection
            arrived.append(theirs["rank"])
        ranks = [(cards[rank]["host"], cards[rank]["port"]) for rank in sorted(cards)]
        stack.callback(proof.unlink, missing_ok=True)
        shared = folder.exists()  # else rank 0 has complained already
        if shared:
            proof.touch()
        for connection in others.values():
            send(connection, {"ranks": ranks, "proof": str(proof.absolute()) if shared else None})
        complaints = [text for rank in sorted(cards) for text in cards[rank]["complaints"]]
        complaints += version_complaints(cards) + call_neighbour(own, ranks, 0)
        for rank in sorted(others):
            complaints += receive(others[rank])
        for connection in others.values():
            send(connection, bool(complaints))
    return complaints


def call_neighbour(own: Listener, ranks: Sequence[tuple[str, int]], rank: int) -> list[str]:
    """Connect to the next rank, be called by the one before."""
    host, port = ranks[(rank + 1) % len(ranks)]
    try:
        with call((host, port)) as after:
            send(after, rank)
            with own.accept() as before:
                receive(before)
    except OSError as error:
        return [f"rank {rank} on {ranks[rank][0]} cannot reach {host}: {error.strerror or error}"]
    return []


def version_complaints(cards: Mapping[int, Card]) -> list[str]:
    """Where a rank's software differs from rank 0's."""
    return [
        f"rank {rank} on {card['host']}: {name} is {card['versions'][name]}, on rank 0 it is {wanted}"
        for rank, card in sorted(cards.items())
        for name, wanted in cards[0]["versions"].items()
        if card["versions"][name] != wanted
    ]


def versions() -> dict[str, str]:
    """Of what must agree between ranks."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def absent(arrived: Sequence[int], size: int, most: int = 8) -> str:
    """The ranks that have not come: "2, 3, 7 and 12 more"."""
    missing = [str(rank) for rank in range(size) if rank not in arrived]
    return ", ".join(missing[:most]) + (f" and {len(missing) - most} more" if len(missing) > most else "")


def host_name(environ: Mapping[str, str]) -> str:
    """This node as the others know it."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def listen(port: int) -> Listener:
    """On all interfaces; port 0 is any free one."""
    return Listener(("", port), family="AF_INET", backlog=4096)


def call(address: tuple[str, int]) -> Connection:
    """Connect, waiting for a listener that is not up yet (the deadline ends that)."""
    while True:
        try:
            return Client((address[0], address[1]), family="AF_INET")
        except ConnectionRefusedError:
            time.sleep(0.2)


def send(connection: Connection, value: Any) -> None:
    """JSON rather than pickle: nothing that arrives is executed."""
    connection.send_bytes(json.dumps(value).encode())


def receive(connection: Connection) -> Any:
    """Inverse of `send`.

    Raises:
        UserError: the other side has ended.
    """
    try:
        return json.loads(connection.recv_bytes())
    except (EOFError, ConnectionError) as error:
        raise UserError("another rank has ended; see its message") from error


@contextmanager
def deadline(message: Callable[[], str]) -> Iterator[None]:
    """UserError after DEADLINE_S of a block, whatever it waits for."""

    def ring(*_: object) -> None:
        raise UserError(message())

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(DEADLINE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
