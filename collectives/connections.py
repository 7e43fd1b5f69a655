"""A socket between two ranks: messages of a known length, out in their order, in to where they are waited for.

    on the wire    context (8) │ tag (8) │ length (8) │ the bytes        context: which communicator

    posted     receives that wait for their message, in order per (context, tag); it is read right into their array
    held       short messages that came before their receive: at most HELD bytes of each peer
    beyond     a long message without a receive stays in the socket, and what is behind it; the sender has to wait

So a peer can make this rank hold no more than HELD bytes, whatever it claims to send. Invariants: nothing here waits;
a message whose length is not that of its receive is an error of this receive alone. When the peer closes or dies, the
system says so at once: what came before is still delivered, and whatever waits for more is over (`PeerLost`).
"""

import socket
import struct
from collections import defaultdict, deque
from collections.abc import Callable

from dtrain.collectives.work import Request

HEAD = struct.Struct("<QqQ")
EAGER = 1 << 16  # a message up to this length may be held
HELD = 1 << 20
SCRAP = 1 << 16

Key = tuple[int, int]


class PeerLost(RuntimeError):
    """The connection to a rank has ended: its process is gone."""

    def __init__(self, rank: int, host: str, reason: str) -> None:
        """`rank`: in the world."""
        super().__init__(f"rank {rank} on {host}: {reason}")
        self.rank = rank


class Message(Request):
    """A message under way; `done` or not, it is over when the connection is."""

    def __init__(self, connection: "Connection", views: list[memoryview]) -> None:
        self.connection = connection
        self.views = views  # what is still to be sent; of a receive: where to
        self.done = False
        self.wrong = ""

    def test(self) -> bool:
        """Has it finished, or can it no more? `wait` tells which."""
        if not self._over():
            self.connection.pump()
        return self._over()

    def _over(self) -> bool:
        return self.done or bool(self.wrong or self.connection.gone)

    def wait(self) -> None:
        """Return when it has finished; PeerLost, ValueError."""
        if not self.test():
            self.connection.patiently(self)
        if self.wrong:
            raise ValueError(self.wrong)
        if not self.done:
            raise PeerLost(self.connection.rank, self.connection.host, self.connection.gone)


class Connection:
    """The socket to one peer. `pump` moves everything of this rank on, `patiently` waits for a message."""

    def __init__(
        self, link: socket.socket, rank: int, host: str, pump: Callable[[], None], patiently: Callable[[Message], None]
    ) -> None:
        self.link, self.rank, self.host = link, rank, host
        self.pump, self.patiently = pump, patiently
        self.gone = ""
        """Why the connection has ended; empty: it has not."""
        self.outgoing: deque[Message] = deque()
        self._posted: dict[Key, deque[Message]] = defaultdict(deque)
        self._held: dict[Key, deque[bytes]] = defaultdict(deque)
        self._num_held = 0
        self._head = memoryview(bytearray(HEAD.size))
        self._read = 0  # bytes of the head, then of the message
        self._key: Key | None = None  # of the message that is coming
        self._left = 0
        self._into: memoryview | None = None
        self._message: Message | None = None  # the receive it goes to; None while _into is set: it is held
        link.setblocking(False)

    # Out

    def send(self, key: Key, content: memoryview) -> Message:
        """Start to send."""
        message = Message(self, [memoryview(HEAD.pack(*key, content.nbytes)), content])
        if not self.gone:
            self.outgoing.append(message)
            self.write()
        return message

    def write(self) -> None:
        """Give the system what it takes now."""
        try:
            while self.outgoing:
                message = self.outgoing[0]
                sent = self.link.sendmsg(message.views)
                while message.views and sent >= message.views[0].nbytes:
                    sent -= message.views.pop(0).nbytes
                if message.views:
                    message.views[0] = message.views[0][sent:]
                else:
                    message.done = True
                    self.outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self.read()  # what it said before is still there
            self.end(error.strerror or str(error))

    # In

    def receive(self, key: Key, target: memoryview) -> Message:
        """Start to receive."""
        message = Message(self, [target])
        if self._held.get(key):
            content = self._held[key].popleft()
            self._num_held -= len(content)
            self._deliver(message, key, content)
        else:
            self._posted[key].append(message)
        return message

    def read(self) -> None:
        """Take what has come, as far as there is a place for it."""
        try:
            while not self.gone and self._advance():
                pass
        except BlockingIOError:
            pass
        except OSError as error:
            self.end(error.strerror or str(error))

    def _advance(self) -> bool:
        """A step further; False: the next message has to wait for its receive."""
        if self._read < HEAD.size:
            self._read += self._take(self._head[self._read :])
            return True
        if self._key is None and not self._place():
            return False
        if self._left:
            part = memoryview(bytearray(min(self._left, SCRAP))) if self._into is None else self._into[-self._left :]
            self._left -= self._take(part)
        if not self._left:
            self._finish()
        return True

    def _take(self, view: memoryview) -> int:
        count = self.link.recv_into(view)
        if not count:
            self.end("its connection is closed")
        return count

    def _place(self) -> bool:
        """Where the message whose head has come goes to."""
        context, tag, length = HEAD.unpack(self._head)
        key = context, tag
        if self._posted.get(key):
            self._message = self._posted[key].popleft()
            (target,) = self._message.views
            self._into = target if target.nbytes == length else None
            if self._into is None:
                self._message.wrong = self._mismatch(tag, length, target.nbytes)
        elif length <= EAGER and self._num_held + length <= HELD:
            self._num_held += length
            self._message, self._into = None, memoryview(bytearray(length))
        else:
            return False
        self._key, self._left = key, length
        return True

    def _finish(self) -> None:
        """The message is complete."""
        key, message, into = self._key, self._message, self._into
        assert key is not None
        self._read, self._key, self._message, self._into = 0, None, None, None
        if message is not None:
            message.done = True
        elif into is not None:
            if self._posted.get(key):  # its receive began while it came
                self._num_held -= into.nbytes
                self._deliver(self._posted[key].popleft(), key, bytes(into))
            else:
                self._held[key].append(bytes(into))

    def _deliver(self, message: Message, key: Key, content: bytes) -> None:
        (target,) = message.views
        if target.nbytes == len(content):
            target[:] = content
        else:
            message.wrong = self._mismatch(key[1], len(content), target.nbytes)
        message.done = True

    def _mismatch(self, tag: int, came: int, expected: int) -> str:
        return f"recv from rank {self.rank}, tag {tag}: {came} bytes came, out= has {expected}"

    def end(self, reason: str) -> None:
        """Close the socket; whatever was open is over."""
        if not self.gone:
            self.gone = reason
            self.outgoing.clear()
            self.link.close()
