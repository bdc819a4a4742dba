"""Check all ranks before torch is loaded: are all present, with the same software, a shared folder and a network?

Rank 0 listens at the address of torch.distributed's rendezvous. Then each rank connects to the next one, so that every
node has opened and accepted a connection. A rank that is missing or unreachable is named. Without this check the first
collective would hang.
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
from minitron_train.runtime.launch import World, host_name, rendezvous
from minitron_train.runtime.records import Count, decode

T = TypeVar("T")

CALL_S = 15  # timeout of a connection to the next rank: four SYN packets, in case the first ones are lost
ANSWER_S = 30  # timeout of the ranks' answers after that
PACKAGES = ("minitron_train", "torch", "megatron-core", "transformers")  # must be the same on all ranks

MAX_MESSAGE_BYTES = 2**26  # far above the messages of 10,000 ranks
Port = Annotated[int, Meta(ge=1, le=65535)]


class Card(TypedDict):
    """What each rank reports about itself."""

    rank: Count
    host: str
    port: Port  # the previous rank connects to it
    versions: dict[str, str]
    complaints: list[str]


class Notice(TypedDict):
    """Rank 0's answer once all ranks are connected."""

    ranks: list[tuple[str, Port]]
    proof: str | None  # path of a file that all ranks must see


Complaints = list[str]


def preflight(
    complaints: list[str], folder: Path, world: World, environ: Mapping[str, str], deadline_s: float
) -> list[str]:
    """Gather the complaints of all ranks, and check the software, the shared folder and the network.

    Args:
        complaints: what this rank has found so far.
        folder: rank 0 creates a file in it that the other ranks must see.
        environ: MASTER_ADDR and MASTER_PORT of the rendezvous.
        deadline_s: until all ranks have connected.

    Returns:
        On rank 0 all complaints; on the others the first one, with a reference to rank 0's message. Empty without
        complaints.

    Raises:
        UserError: a rank is missing, or could not reach rank 0.
    """
    first = rendezvous(environ)
    with listen(0) as own:  # the previous rank connects to it; the kernel completes that without accept()
        here = {"rank": world.rank, "host": host_name(environ), "port": own.address[1]}
        card = Card(**here, versions=versions(), complaints=complaints)
        return (
            gather(card, folder, first, world.size, deadline_s)
            if world.is_first
            else report(card, folder, first, deadline_s)
        )


def report(card: Card, folder: Path, first: tuple[str, int], deadline_s: float) -> list[str]:
    """The check on the ranks above 0."""
    there = f"{first[0]}:{first[1]}"
    patience_s = deadline_s + ANSWER_S  # rank 0 knows more, so it must give up first
    with deadline(
        deadline_s, lambda: f"{card['host']} could not reach rank 0 at {there}; check for a firewall between them"
    ):
        try:
            connection = call(first)
        except OSError as error:
            raise UserError(f"{card['host']} cannot reach {there}: {error.strerror or error}") from error
    with connection:
        send(connection, card)
        notice = receive(connection, Notice, "rank 0", patience_s)
        seen = notice["proof"] is None or Path(notice["proof"]).exists()
        found = [] if seen else [f"{card['host']}: does not see {folder} of rank 0; put output_dir on a shared disk"]
        send(connection, found + call_neighbour(notice["ranks"], card["rank"]))
        return [f"see the message of rank 0: {text}" for text in receive(connection, Complaints, "rank 0", patience_s)]


def gather(card: Card, folder: Path, first: tuple[str, int], size: int, deadline_s: float) -> list[str]:
    """The check on rank 0."""
    cards, proof = {0: card}, folder / f".preflight-{uuid.uuid4().hex[:8]}"
    others: dict[int, Connection] = {}
    here = f"{first[0]}:{first[1]}"
    with ExitStack() as stack:
        listener = stack.enter_context(listen_at(first))
        remedy = "check their nodes, a firewall between them, or parallel.rendezvous_minutes"
        with deadline(deadline_s, lambda: f"ranks {absent(cards, size)} did not reach {here}; {remedy}"):
            while len(cards) < size:
                connection = stack.enter_context(listener.accept())
                theirs = receive(connection, Card, "another rank", deadline_s)
                if theirs["rank"] in cards or theirs["rank"] >= size:
                    who = f"{theirs['host']} claims rank {theirs['rank']} of {size}"
                    raise UserError(f"{who}, which is taken or does not exist; check that no other job uses {here}")
                cards[theirs["rank"]], others[theirs["rank"]] = theirs, connection
        ranks = [(cards[rank]["host"], cards[rank]["port"]) for rank in sorted(cards)]
        stack.callback(proof.unlink, missing_ok=True)
        shared = folder.exists()  # otherwise rank 0 has complained already
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
    """Complaints of the ranks above 0, and one about each rank that has ended or does not answer."""
    until_s = time.monotonic() + ANSWER_S
    for rank in sorted(others):
        try:
            who, patience_s = f"rank {rank} on {ranks[rank][0]}", until_s - time.monotonic()
            yield from receive(others[rank], Complaints, who, patience_s)
        except UserError as error:
            yield str(error)


def call_neighbour(ranks: Sequence[tuple[str, int]], rank: int) -> list[str]:
    """Connect to the next rank, which takes packets in both directions. Returns a complaint if that fails."""
    after = (rank + 1) % len(ranks)
    host, port = ranks[after]
    try:
        with socket.socket() as caller:
            caller.settimeout(CALL_S)
            caller.connect((host, port))
    except OSError as error:
        link = f"rank {rank} on {ranks[rank][0]} cannot reach rank {after} on {host}"
        return [f"{link}: {error.strerror or error}; check for a firewall between them"]
    return []


def version_complaints(cards: Mapping[int, Card]) -> list[str]:
    """A complaint for each version that differs from rank 0's."""
    return [
        f"rank {rank} on {card['host']}: {name} is {found}, on rank 0 it is {wanted}"
        for rank, card in sorted(cards.items())
        for name, wanted in cards[0]["versions"].items()
        if (found := card["versions"].get(name, "unknown")) != wanted
    ]


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def absent(arrived: Collection[int], size: int, most: int = 8) -> str:
    """The missing ranks as text: "2, 3, 7 and 12 more"."""
    missing = [str(rank) for rank in range(size) if rank not in arrived]
    return ", ".join(missing[:most]) + (f" and {len(missing) - most} more" if len(missing) > most else "")


def listen(port: int) -> Listener:
    """Listen on all interfaces; port 0 takes any free one."""
    return Listener(("", port), family="AF_INET", backlog=4096)


def listen_at(first: tuple[str, int]) -> Listener:
    """Listen at the rendezvous, for rank 0.

    Raises:
        UserError: another program uses the port.
    """
    try:
        return listen(first[1])
    except OSError as error:
        raise UserError(f"MASTER_PORT={first[1]}: {error.strerror} on {first[0]}; set another one") from error


def call(address: tuple[str, int]) -> Connection:
    """Connect. Retries until the listener is up; `deadline` limits that."""
    while True:
        try:
            return Client((address[0], address[1]), family="AF_INET")
        except ConnectionRefusedError:
            time.sleep(0.2)


def send(connection: Connection, value: Any) -> None:
    """Send JSON, not pickle: nothing that arrives is executed. If the other side has ended, `receive` reports it."""
    with suppress(ConnectionError):
        connection.send_bytes(json.dumps(value).encode())


def receive(connection: Connection, kind: type[T], who: str, patience_s: float) -> T:
    """Receive what the other side passed to `send`, within `patience_s`.

    Raises:
        UserError: `who` has ended, does not answer in time, or sends something that is not a `kind`.
    """
    try:
        if not connection.poll(max(0.0, patience_s)):
            raise UserError(f"{who} does not answer; check its node")
        data = connection.recv_bytes(MAX_MESSAGE_BYTES)
    except (EOFError, ConnectionError) as error:
        raise UserError(f"{who} has ended; see its message") from error
    except OSError:  # raised by multiprocessing for a message above the limit
        data = b""
    return decode(data, kind, f"message from {who}", "another program may use MASTER_PORT: choose another port")


@contextmanager
def deadline(limit_s: float, message: Callable[[], str]) -> Iterator[None]:
    """Raise a UserError when the block takes longer than `limit_s`, whatever it waits for."""

    def ring(*_: object) -> None:
        raise UserError(f"after {limit_s:.0f} s: {message()}")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
