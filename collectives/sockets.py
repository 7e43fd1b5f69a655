"""The transport over TCP: what goes on where MPI would end everybody, because one of its processes was killed.

    MPI      addresses and a secret, once          after `connect` nobody calls MPI any more
    TCP      one connection per pair of ranks      rank 0 ◄── 1 ◄── 2: the higher one connects, says the secret and who
                                                   it is; everybody else is turned away, and then nobody listens

`connect(comm)` makes a communicator between the same ranks. To it, this is one transport of several: `split`,
collectives and counters are those of MPI or threads. Where a peer is lost, messages with it raise PeerLost at once,
and those with others go on. Collectives are the plain ones of `from_messages.py`; this is for messages, not for speed:
n ranks have n (n - 1) / 2 connections.
"""

import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import NoReturn

import numpy as np

from dtrain.collectives import interfaces
from dtrain.collectives.communicator import Communicator
from dtrain.collectives.connections import Connection, Message
from dtrain.collectives.dtypes import Array
from dtrain.collectives.from_messages import FromMessages
from dtrain.collectives.native import octets
from dtrain.collectives.transport import Transport as AnyTransport
from dtrain.collectives.waiting import NAPS, YIELD_SECONDS, CollectiveTimeout, hand_over, timeout_seconds

SECRET = 16  # bytes
HELLO = SECRET + 8  # the secret, and a rank
PATIENCE = 2.0  # seconds for a caller to say who it is
MEETING = 60.0  # seconds for all to come


def connect(comm: Communicator) -> Communicator:
    """A communicator over sockets between the ranks of `comm`, which is not used afterwards. Collective."""
    nodes = comm.transport.nodes
    own = interfaces.addresses() if len(set(nodes)) > 1 else {}
    everyone = comm.all_gather_object(list(own.values()))
    others = [everyone[nodes.index(node)] for node in dict.fromkeys(nodes) if node != nodes[comm.rank]]
    with socket.create_server((interfaces.choose(own, others, interfaces.wished()), 0), backlog=comm.size) as listener:
        places = comm.all_gather_object(listener.getsockname())
        secret = np.frombuffer(secrets.token_bytes(SECRET), np.uint8)
        secret = comm.broadcast(secret)
        comm.rest()
        links = {rank: call(places[rank], secret.tobytes(), comm.rank) for rank in range(comm.rank)}
        links |= answer(listener, secret.tobytes(), set(range(comm.rank + 1, comm.size)))
    meeting = Meeting(links, comm.hosts)
    return Communicator(Transport(meeting, comm.transport, range(comm.size), comm.rank, 0))


def call(place: Sequence[str | int], secret: bytes, rank: int) -> socket.socket:
    """Connect to the rank that listens there."""
    host, port = str(place[0]), int(place[1])
    try:
        link = socket.create_connection((host, port), MEETING)
    except OSError as error:
        raise ConnectionError(
            f"{socket.gethostname()} cannot connect to {host}: {error.strerror or error}; a firewall, or "
            "DTRAIN_INTERFACE names another interface"
        ) from None
    link.sendall(secret + rank.to_bytes(8, "little"))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def answer(listener: socket.socket, secret: bytes, missing: set[int]) -> dict[int, socket.socket]:
    """Wait until all of these ranks have called; whoever else calls is turned away."""
    links: dict[int, socket.socket] = {}
    end = time.monotonic() + MEETING
    while missing:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            link, _ = listener.accept()
        except TimeoutError:
            raise ConnectionError(f"ranks {sorted(missing)} did not connect within {MEETING:.0f} s") from None
        said = hear(link)
        rank = int.from_bytes(said[SECRET:], "little")
        if len(said) == HELLO and hmac.compare_digest(said[:SECRET], secret) and rank in missing:
            missing.remove(rank)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            links[rank] = link
        else:
            link.close()
    return links


def hear(link: socket.socket) -> bytes:
    """What a caller says first: no more than expected, and not for long."""
    said, end = b"", time.monotonic() + PATIENCE
    try:
        while len(said) < HELLO and (left := end - time.monotonic()) > 0:
            link.settimeout(left)
            more = link.recv(HELLO - len(said))
            if not more:
                break
            said += more
    except OSError:
        pass
    return said


class Meeting:
    """All connections of this rank."""

    def __init__(self, links: dict[int, socket.socket], hosts: Sequence[str]) -> None:
        self.limit = timeout_seconds()
        self.connections = {
            rank: Connection(link, rank, hosts[rank], self.pump, self.patiently) for rank, link in links.items()
        }
        self._selector = selectors.DefaultSelector()
        for connection in self.connections.values():
            self._selector.register(connection.link, selectors.EVENT_READ, connection)

    def pump(self) -> None:
        """Move on whatever can be moved; never waits."""
        for key, _ in self._selector.select(0):
            connection: Connection = key.data
            connection.read()
            if connection.gone:
                self._selector.unregister(key.fileobj)
        for connection in self.connections.values():
            if connection.outgoing:
                connection.write()

    def patiently(self, message: Message) -> None:
        """Return when the message is over."""
        began, naps = time.monotonic(), 0
        while not message.test():
            waited = time.monotonic() - began
            if waited < YIELD_SECONDS:
                hand_over()
                continue
            if waited > self.limit:
                peer = message.connection
                raise CollectiveTimeout(f"waited {waited:.0f} s for rank {peer.rank} on {peer.host}")
            time.sleep(NAPS[naps > 100])
            naps += 1

    def close(self) -> None:
        """Close all; what the system has taken is still sent."""
        self._selector.close()
        for connection in self.connections.values():
            connection.end("closed here")


class Transport(FromMessages):
    """The ranks of a meeting, or some of them."""

    name = "sockets"
    shares = False
    threaded = False
    say = None
    crowded = False  # its waits hand the core over

    def __init__(self, meeting: Meeting, whole: AnyTransport, members: Sequence[int], rank: int, context: int) -> None:
        """`whole`: between all ranks of the meeting; `members`: the ranks there of those here; `context`: their own."""
        self._meeting, self._whole, self._members, self._context = meeting, whole, members, context
        self.rank, self.size = rank, len(members)
        self.hosts = [whole.hosts[member] for member in members]
        self.nodes = [whole.nodes[member] for member in members]
        self.world_ranks = [whole.world_ranks[member] for member in members]
        self._splits = 0

    def start_send(self, source: Array, destination: int, tag: int) -> Message:
        connection = self._meeting.connections[self._members[destination]]
        return connection.send((self._context, tag), octets(source).data)

    def start_recv(self, target: Array, source: int, tag: int) -> Message:
        connection = self._meeting.connections[self._members[source]]
        return connection.receive((self._context, tag), octets(target).data)

    def split(self, color: int | None, key: int) -> "Transport | None":
        rows = np.empty((self.size, 2), np.int64)
        mine = np.array([-1 if color is None else color, key], np.int64)
        self.all_gather(mine, rows.reshape(-1), [2] * self.size)
        self._splits += 1
        if color is None:
            return None
        group = sorted((row[1], rank) for rank, row in enumerate(rows.tolist()) if row[0] == color)
        name = f"{self._context}/{self._splits}.{color}".encode()
        context = int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
        ranks = [rank for _, rank in group]
        members = [self._members[rank] for rank in ranks]
        return Transport(self._meeting, self._whole, members, ranks.index(self.rank), context)

    def share(self, nbytes: int) -> NoReturn:
        raise AssertionError("sockets share no memory")

    def post(self) -> NoReturn:
        raise AssertionError("sockets have no post")

    def close(self) -> None:
        """The connections go with the communicator of all."""
        if self._context == 0:
            self._meeting.close()

    def abort(self, code: int) -> NoReturn:
        self._whole.abort(code)
