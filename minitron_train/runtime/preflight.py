"""All ranks meet before torch is loaded: is everyone there, with the same software, the same folder, a way to the others?

Rank 0 listens where torch.distributed's rendezvous will be; then each rank connects to the next one, so that every node
has been connected to and from. A rank that does not come, or cannot reach another, is named, instead of a hanging first
collective.
"""

import importlib.metadata
import json
import platform
import signal
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

from msgspec import Meta

from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World, rendezvous
from minitron_train.runtime.records import Count, decode

T = TypeVar("T")

DEADLINE_S = 90  # for all ranks to come; job steps start within seconds of each other
CALL_S = 15  # for a connection to a neighbour that is there: four packets, should the first ones be lost
ANSWER_S = 30  # for what the ranks have to say after that
PATIENCE_S = DEADLINE_S + ANSWER_S  # of the others with rank 0, which knows more and ends first
PACKAGES = ("minitron_train", "torch", "megatron-core", "transformers")  # must be the same on all ranks

MAX_MESSAGE_BYTES = 2**26  # far above what 10,000 ranks have to say
Port = Annotated[int, Meta(ge=1, le=65535)]


class Card(TypedDict):
    """What a rank above 0 reports first. Rank 0 has one of its own."""

    rank: Count
    host: str
    port: Port  # where the rank before connects to
    versions: dict[str, str]
    complaints: list[str]


class Notice(TypedDict):
    """What rank 0 answers when all are there."""

    ranks: list[tuple[str, Port]]
    proof: str | None  # a file that all must see


Complaints = list[str]


def preflight(complaints: list[str], folder: Path, world: World, environ: Mapping[str, str]) -> list[str]:
    """Bring the complaints of all ranks together, and add those about software, shared folder and network.

    Args:
        complaints: this rank's own.
        folder: exists for rank 0, which puts a file into it that the others must see.
        environ: MASTER_ADDR and MASTER_PORT of the rendezvous.

    Returns:
        On rank 0 everyone's complaints, elsewhere a reference to them, with the first; empty where there are none.

    Raises:
        UserError: a rank did not come, or could not reach rank 0.
    """
    first = rendezvous(environ)
    with listen(0) as own:  # the rank before connects to it; nothing need be accepted for that
        here = {"rank": world.rank, "host": host_name(environ), "port": own.address[1]}
        card = Card(**here, versions=versions(), complaints=complaints)
        return gather(card, folder, first, world.size) if world.is_first else report(card, folder, first)


def report(card: Card, folder: Path, first: tuple[str, int]) -> list[str]:
    """The side of the ranks above 0."""
    there = f"{first[0]}:{first[1]}"
    with deadline(lambda: f"{card['host']} could not reach rank 0 at {there}; is a firewall between?"):
        try:
            connection = call(first)
        except OSError as error:
            raise UserError(f"{card['host']} cannot reach {there}: {error.strerror or error}") from error
    with connection:
        send(connection, card)
        notice = receive(connection, Notice, "rank 0", PATIENCE_S)
        seen = notice["proof"] is None or Path(notice["proof"]).exists()
        found = (
            [] if seen else [f"{card['host']}: does not see {folder} of rank 0; output_dir must be on a shared disk"]
        )
        send(connection, found + call_neighbour(notice["ranks"], card["rank"]))
        return [f"see the message of rank 0: {text}" for text in receive(connection, Complaints, "rank 0", PATIENCE_S)]


def gather(card: Card, folder: Path, first: tuple[str, int], size: int) -> list[str]:
    """Rank 0's side."""
    cards, proof = {0: card}, folder / f".meeting-{uuid.uuid4().hex[:8]}"
    others: dict[int, Connection] = {}
    here = f"{first[0]}:{first[1]}"
    with ExitStack() as stack:
        listener = stack.enter_context(listen_at(first))
        with deadline(lambda: f"ranks {absent(cards, size)} did not reach {here}; is a firewall between?"):
            while len(cards) < size:
                connection = stack.enter_context(listener.accept())
                theirs = receive(connection, Card, "another rank", DEADLINE_S)
                if theirs["rank"] in cards or theirs["rank"] >= size:
                    who = f"{theirs['host']} claims rank {theirs['rank']} of {size}"
                    raise UserError(f"{who}, which is taken or does not exist; does a second job use {here}?")
                cards[theirs["rank"]], others[theirs["rank"]] = theirs, connection
        ranks = [(cards[rank]["host"], cards[rank]["port"]) for rank in sorted(cards)]
        stack.callback(proof.unlink, missing_ok=True)
        shared = folder.exists()  # else rank 0 has complained already
        if shared:
            proof.touch()
        for connection in others.values():
            send(connection, {"ranks": ranks, "proof": str(proof.absolute()) if shared else None})
        complaints = [text for rank in sorted(cards) for text in cards[rank]["complaints"]]
        complaints += [*version_complaints(cards), *call_neighbour(ranks, 0), *answers(others, ranks)]
        for connection in others.values():
            send(connection, complaints[:1])
    return complaints


def answers(others: Mapping[int, Connection], ranks: Sequence[tuple[str, int]]) -> Iterator[str]:
    """What the ranks above 0 have found; of one that has ended or is silent, that."""
    until_s = time.monotonic() + ANSWER_S
    for rank in sorted(others):
        try:
            who, patience_s = f"rank {rank} on {ranks[rank][0]}", until_s - time.monotonic()
            yield from receive(others[rank], Complaints, who, patience_s)
        except UserError as error:
            yield str(error)


def call_neighbour(ranks: Sequence[tuple[str, int]], rank: int) -> list[str]:
    """Connect to the next rank. Once that is done, packets have gone both ways."""
    after = (rank + 1) % len(ranks)
    host, port = ranks[after]
    try:
        with socket.socket() as caller:
            caller.settimeout(CALL_S)
            caller.connect((host, port))
    except OSError as error:
        link = f"rank {rank} on {ranks[rank][0]} cannot reach rank {after} on {host}"
        return [f"{link}: {error.strerror or error}; is a firewall between?"]
    return []


def version_complaints(cards: Mapping[int, Card]) -> list[str]:
    """Where a rank's software differs from rank 0's."""
    return [
        f"rank {rank} on {card['host']}: {name} is {found}, on rank 0 it is {wanted}"
        for rank, card in sorted(cards.items())
        for name, wanted in cards[0]["versions"].items()
        if (found := card["versions"].get(name, "unknown")) != wanted
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


def absent(arrived: Collection[int], size: int, most: int = 8) -> str:
    """The ranks that have not come: "2, 3, 7 and 12 more"."""
    missing = [str(rank) for rank in range(size) if rank not in arrived]
    return ", ".join(missing[:most]) + (f" and {len(missing) - most} more" if len(missing) > most else "")


def host_name(environ: Mapping[str, str]) -> str:
    """This node as the others know it."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def listen(port: int) -> Listener:
    """On all interfaces; port 0 is any free one."""
    return Listener(("", port), family="AF_INET", backlog=4096)


def listen_at(first: tuple[str, int]) -> Listener:
    """Rank 0's, where the others look for it.

    Raises:
        UserError: another program has the port.
    """
    try:
        return listen(first[1])
    except OSError as error:
        raise UserError(f"MASTER_PORT={first[1]}: {error.strerror} on {first[0]}; set another one") from error


def call(address: tuple[str, int]) -> Connection:
    """Connect, waiting for a listener that is not up yet (the deadline ends that)."""
    while True:
        try:
            return Client((address[0], address[1]), family="AF_INET")
        except ConnectionRefusedError:
            time.sleep(0.2)


def send(connection: Connection, value: Any) -> None:
    """JSON rather than pickle: nothing that arrives is executed. `receive` tells when the other side has ended."""
    with suppress(ConnectionError):
        connection.send_bytes(json.dumps(value).encode())


def receive(connection: Connection, kind: type[T], who: str, patience_s: float) -> T:
    """Inverse of `send`.

    Raises:
        UserError: the other side, `who`, has ended, is silent, or says something else than a `kind`.
    """
    try:
        if not connection.poll(max(0.0, patience_s)):
            raise UserError(f"{who} does not answer; does its node still run?")
        data = connection.recv_bytes(MAX_MESSAGE_BYTES)
    except (EOFError, ConnectionError) as error:
        raise UserError(f"{who} has ended; see its message") from error
    except OSError:  # multiprocessing's, for a length above the limit
        data = b""
    return decode(data, kind, f"message from {who}", "does another program use MASTER_PORT? choose another port")


@contextmanager
def deadline(message: Callable[[], str]) -> Iterator[None]:
    """UserError after DEADLINE_S of a block, whatever it waits for."""

    def ring(*_: object) -> None:
        raise UserError(f"{DEADLINE_S} s: {message()}")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(DEADLINE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
