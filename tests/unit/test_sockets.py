"""The transport over sockets: what every communicator must do, and what becomes of the rest when a rank is gone.

The ranks are threads, which bring the addresses round; what they say to one another afterwards crosses real sockets.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import Communicator, interfaces, run_threads, sockets
from dtrain.collectives.connections import EAGER, HEAD, HELD, Connection, Message, PeerLost
from tests import collective_cases


def over_sockets(size: int, function: Callable[[Communicator], Any]) -> list[Any]:
    """function(comm) on threads that talk through sockets."""

    def run(comm: Communicator) -> Any:
        part = sockets.connect(comm)
        try:
            return function(part)
        finally:
            part.transport.close()

    return run_threads(size, run)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", collective_cases.ALL)
def test_case(name: str, size: int) -> None:
    over_sockets(size, collective_cases.ALL[name])


def test_messages_longer_than_what_is_held_wait_for_their_receive() -> None:
    """Rank 0 sends more than the system and the other rank keep; nothing is lost, and the tags are told apart."""
    count = 40 * HELD // 8

    def talk(comm: Communicator) -> None:
        if comm.rank == 0:
            long, short = comm.send_async(np.arange(count), 1, tag=1), comm.send_async(np.arange(3), 1, tag=1)
            assert not long.done() and not short.done()
            np.testing.assert_array_equal(comm.recv(np.empty(2), 1, tag=2), [7.0, 8.0])
            long.wait()
            short.wait()
        else:
            comm.send(np.array([7.0, 8.0]), 0, tag=2)
            time.sleep(0.2)
            np.testing.assert_array_equal(comm.recv(np.empty(count, int), 0, tag=1), np.arange(count))
            np.testing.assert_array_equal(comm.recv(np.empty(3, int), 0, tag=1), np.arange(3))

    over_sockets(2, talk)


def test_parts_of_a_split_do_not_hear_one_another() -> None:
    def talk(comm: Communicator) -> int:
        part = comm.split(comm.rank % 2)
        again = comm.split(0, key=-comm.rank)
        assert part is not None and again is not None
        assert part.all_gather_object(comm.rank) == [rank for rank in range(5) if rank % 2 == comm.rank % 2]
        assert again.all_gather_object(comm.rank) == [4, 3, 2, 1, 0] and again.rank == 4 - comm.rank
        return int(part.all_reduce(np.array([comm.rank]))[0])

    assert over_sockets(5, talk) == [6, 4, 6, 4, 6]


def test_a_rank_that_is_gone_is_noticed_at_once_and_others_talk_on() -> None:
    """What it sent before is still delivered. No time limit is needed: it is 300 s here."""

    def talk(comm: Communicator) -> str:
        if comm.rank == 2:
            comm.send(np.arange(EAGER), 0)
            comm.transport.close()
            return ""
        if comm.rank == 0:
            np.testing.assert_array_equal(comm.recv(np.empty(EAGER, int), 2), np.arange(EAGER))
        work = comm.recv_async(np.empty(1), 2, tag=5)
        with pytest.raises(PeerLost, match=r"^rank 2 on \S+: ") as caught:
            work.wait()
        assert work.done() and caught.value.rank == 2
        with pytest.raises(PeerLost):
            comm.send(np.zeros(1 << 22), 2)
        assert comm.sendrecv(np.array([comm.rank]), 1 - comm.rank, np.empty(1, int), 1 - comm.rank)[0] == 1 - comm.rank
        return str(caught.value)

    over_sockets(3, talk)


def test_requests_that_nobody_waits_for_are_forgotten() -> None:
    """A server only asks whether its answers have left."""

    def talk(comm: Communicator) -> None:
        other = 1 - comm.rank
        for _ in range(5):
            works = [comm.send_async(np.zeros(3), other), comm.recv_async(np.empty(3), other)]
            while not all(work.done() for work in works):
                time.sleep(1e-4)
        assert not comm._progress.busy()

    over_sockets(2, talk)


# --- Strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(sockets.SECRET) + (1).to_bytes(8, "little")],
    ids=["silent", "other protocol", "wrong secret"],
)
def test_strangers_are_turned_away(words: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "PATIENCE", 0.2)
    secret = b"s" * sockets.SECRET
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        with socket.create_connection(place) as stranger:
            stranger.sendall(words)
            rank = threading.Thread(target=lambda: found.append(sockets.call(place, secret, 1)))
            found: list[socket.socket] = []
            rank.start()
            links = sockets.answer(listener, secret, {1})
            rank.join()
            stranger.settimeout(5)
            try:
                assert stranger.recv(1) == b""
            except ConnectionError:
                pass  # closed with words of ours unread
            assert list(links) == [1] and links[1].getpeername() == found[0].getsockname()
            links[1].close()
            found[0].close()


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MEETING", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ConnectionError, match=r"ranks \[1, 3\] did"),
    ):
        sockets.answer(listener, b"s" * sockets.SECRET, {1, 3})


def pair() -> tuple[Connection, socket.socket]:
    """A connection, and the bare socket at its other end."""
    near, far = socket.socketpair()

    def patiently(message: Message) -> None:
        while not message.test():
            time.sleep(1e-3)

    connection = Connection(near, 1, "there", lambda: connection.read(), patiently)
    return connection, far


def test_a_peer_cannot_fill_the_memory() -> None:
    """It claims a message of 2^60 bytes, then floods: what is held stays below the limit."""
    connection, far = pair()
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            far.send(HEAD.pack(0, 9, 1024) + bytes(1024))
            connection.read()
    assert connection._num_held <= HELD
    connection.end("")
    far.close()
    connection, far = pair()
    far.sendall(HEAD.pack(0, 9, 1 << 60) + bytes(1024))
    connection.read()
    assert connection._num_held == 0
    message = connection.receive((0, 9), memoryview(bytearray(4)))
    far.close()
    with pytest.raises((ValueError, PeerLost)):
        message.wait()
    connection.end("")


def test_a_message_of_another_length_is_an_error_of_its_receive_alone() -> None:
    connection, far = pair()
    far.sendall(HEAD.pack(0, 9, 3) + b"abc" + HEAD.pack(0, 9, 2) + b"de" + HEAD.pack(0, 7, 1) + b"f")
    target = bytearray(2)
    with pytest.raises(ValueError, match="recv from rank 1, tag 9: 3 bytes came, out= has 2"):
        connection.receive((0, 9), memoryview(bytearray(2))).wait()
    connection.receive((0, 9), memoryview(target)).wait()
    assert target == b"de"
    assert struct.calcsize("<QqQ") == HEAD.size
    connection.end("")
    far.close()


# --- Addresses --------------------------------------------------------------------------------------------------------


def test_one_node_listens_on_loopback_alone() -> None:
    assert interfaces.choose(interfaces.addresses(), []) == "127.0.0.1"


def test_several_nodes_listen_where_the_way_to_the_others_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"10.1.0.2": "10.1.0.1", "192.168.0.9": "", "172.17.0.1": "172.17.0.1"}
    monkeypatch.setattr(interfaces, "towards", lambda address: ways[address])
    own = {"eth0": "10.1.0.1", "docker0": "172.17.0.1"}
    assert interfaces.choose(own, [["172.17.0.1", "192.168.0.9", "10.1.0.2"]]) == "10.1.0.1"
    assert interfaces.choose(own, [["10.1.0.2"]], "docker0") == "172.17.0.1"
    with pytest.raises(ValueError, match=r"DTRAIN_INTERFACE='ib0': not an interface of .*eth0 \(10\.1\.0\.1\)"):
        interfaces.choose(own, [["10.1.0.2"]], "ib0")
    with pytest.raises(ConnectionError, match="has no way to the other nodes"):
        interfaces.choose(own, [["172.17.0.1"]])
