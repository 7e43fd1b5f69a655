"""Runs a schedule between ranks: messages of a transport, sums as soon as what they add has arrived.

    run = Run(plan, transport, source, target, op, tag)
    run.test()      goes on as far as it can without waiting; True: finished
    run.wait()      goes on until it is finished

What happens in which order is the plan's business (`plan.py`). The result has the bits of `interpreter.interpret`:
every sum is taken in the order that the schedule says, whatever the timing and the segments. Partial sums travel in the
dtype of the arrays: float16 and bfloat16 are added in float32 and rounded once per step, so a sum over p ranks is
rounded p - 1 times on a ring, lg p times on a tree, once by `direct` and `gather_reduce`. A float32 on the wire would
double the bytes.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dtrain.collectives.dtypes import Array, accumulator, operation, reduce_rows
from dtrain.collectives.schedules.plan import ARRIVING, SCRATCH, Plan, Span, Sum
from dtrain.collectives.waiting import SPINS, CollectiveTimeout, hand_over
from dtrain.collectives.work import Request

YIELD_SECONDS = 0.02  # a long message moves only while both ends look after it: no naps before
NAP_SECONDS = 100e-6


class Messages(Protocol):
    """What is needed of a transport."""

    rank: int
    size: int

    def start_send(self, source: Array, destination: int, tag: int) -> Request: ...
    def start_recv(self, target: Array, source: int, tag: int) -> Request: ...


_NOTHING: Array = np.empty(0, np.uint8)


class Memory:
    """Buffers for scratch and arrivals, kept for the next call: fresh memory costs a page fault for every 4 KiB."""

    def __init__(self, most: int = 64 << 20) -> None:
        self._free: list[Array] = []
        self._most = most
        self._lock = threading.Lock()  # works may end in the thread of `background.py`

    def take(self, nbytes: int) -> Array:
        """At least so many bytes."""
        if not nbytes:
            return _NOTHING
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if buffer.size >= nbytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].size))
        return np.empty(nbytes, np.uint8)

    def give(self, buffer: Array) -> None:
        """Back again; the smallest are dropped when too much lies here."""
        if not 0 < buffer.size <= self._most:
            return
        with self._lock:
            self._free.append(buffer)
            self._free.sort(key=lambda other: -other.size)
            while sum(other.size for other in self._free) > self._most:
                self._free.pop()


class Run(Request):
    """One schedule under way on one rank."""

    def __init__(
        self,
        plan: Plan,
        transport: Messages,
        source: Array,
        target: Array,
        op: str = "sum",
        tag: int = 0,
        memory: Memory | None = None,
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        """Start: receives are posted, and what can leave has left.

        source: the given chunks; target: room for the wanted ones; the same array only with a plan made in_place.
        arrived: called with a peer's rank after each of its messages, before its data is used; may raise.
        """
        self.plan, self.transport, self.tag = plan, transport, tag
        self.dtype = dtype = source.dtype
        self._ufunc = operation(op, dtype) if op else None
        self._direct = accumulator(dtype) is dtype
        self._quiet = dtype.kind in "fc" or not self._direct
        self._memory = memory or Memory()
        self._arrived = arrived
        self._taken = [self._memory.take(plan.lengths[kind] * dtype.itemsize) for kind in (SCRATCH, ARRIVING)]
        own = [octets[: plan.lengths[kind] * dtype.itemsize] for kind, octets in zip((2, 3), self._taken, strict=True)]
        self._buffers = [source, target, *(octets.view(dtype) for octets in own)]
        self._receives: list[Request | None] = [None] * len(plan.arriving)
        self._sends: dict[int, Request] = {}  # under way
        self._posted = 0
        self._sent = bytearray(len(plan.leaving))  # whether it has been given to the transport
        self.done_events = 0
        self.finished = False
        self._post()
        for copy in plan.copies:
            self._add(copy)
        self._send(plan.at_once)

    def test(self) -> bool:
        """Go on as far as possible; True: this rank is done, and its arrays may be used."""
        if self.finished:
            return True
        events = self.plan.events
        while self.done_events < len(events):
            receive, sends, sums, _, leaving = events[self.done_events]
            if receive >= 0:
                if receive >= self._posted and not self._post_until(receive):
                    return False
                request = self._receives[receive]
                if request is not None:
                    if not self._has_arrived(request, self.plan.arriving[receive].peer):
                        return False
                    self._receives[receive] = None
            if sends and not self._have_left(sends):
                return False
            if sums:
                if self._quiet:
                    with np.errstate(all="ignore"):
                        for each in sums:
                            self._add(each)
                else:
                    for each in sums:
                        self._add(each)
            self.done_events += 1
            if leaving:
                self._send(leaving)
            self._post()
        if self._sends and not self._have_left(tuple(self._sends)):
            return False
        self._close()
        return True

    def wait(self) -> None:
        """Go on until it is finished; the transport's requests know by themselves when to give up."""
        while not self.test():
            try:
                self.pending().wait()
            except Exception:
                self._blame()
                raise

    def wait_patiently(
        self, spin: bool, timeout: float, others: Callable[[], None], look: Callable[[], None], what: str
    ) -> None:
        """`wait`, while others are helped along; `look` is called when it takes long, CollectiveTimeout ends it.

        spin: whether every rank has a core of its own.
        """
        spins = SPINS if spin else 0
        while not self.test():
            if spins:
                spins -= 1
                continue
            before, began, asked = self._state(), time.monotonic(), 0.0
            while not self.test() and self._state() == before:
                others()
                waited = time.monotonic() - began
                if waited > max(YIELD_SECONDS, 2 * asked):
                    asked = waited
                    look()
                if waited > timeout:
                    raise CollectiveTimeout(
                        f"rank {self.transport.rank} of {self.transport.size} waited {waited:.0f} s {self.where()} "
                        f"of {what}\nthe time limit is DTRAIN_TIMEOUT seconds (0: none)"
                    )
                if waited < YIELD_SECONDS:
                    hand_over()
                else:
                    time.sleep(NAP_SECONDS)

    def pending(self) -> Request:
        """What it waits for."""
        if self.done_events < len(self.plan.events):
            event = self.plan.events[self.done_events]
            if 0 <= event.receive < self._posted and (request := self._receives[event.receive]) is not None:
                return request
            if event.receive >= self._posted:  # its room is taken by a send
                waits = self.plan.arriving[self._posted].sends
            else:
                waits = event.sends
            return next(self._sends[send] for send in waits if send in self._sends)
        return next(iter(self._sends.values()))

    def where(self) -> str:
        """What it waits for, in words."""
        plan = self.plan
        if self.done_events < len(plan.events):
            event = plan.events[self.done_events]
            if 0 <= event.receive < self._posted and self._receives[event.receive] is not None:
                peer = plan.arriving[event.receive].peer
                return f"for a message from rank {peer} in step {event.step + 1} of {plan.steps}"
        peers = sorted({plan.leaving[send].peer for send in self._sends})
        return f"until rank {' and rank '.join(map(str, peers))} took what was sent there"

    # Parts of it

    def _state(self) -> tuple[int, int, int]:
        return self.done_events, self._posted, len(self._sends)

    def _post(self) -> None:
        """Post the receives whose room is free; in order, as the sender sends."""
        arriving, done = self.plan.arriving, self.done_events
        while self._posted < len(arriving):
            peer, span, after, sends = arriving[self._posted]
            if after > done or (sends and not self._have_left(sends)):
                return
            self._receives[self._posted] = self.transport.start_recv(self._view(span), peer, self.tag)
            self._posted += 1

    def _has_arrived(self, request: Request, peer: int) -> bool:
        try:
            if not request.test():
                return False
        except Exception:
            self._blame()
            raise
        if self._arrived is not None:
            self._arrived(peer)
        return True

    def _blame(self) -> None:
        """A message that does not fit is a call that does not: who looks at what has arrived has a word for that."""
        if self._arrived is not None and self.done_events < len(self.plan.events):
            receive = self.plan.events[self.done_events].receive
            self._arrived(self.plan.arriving[receive].peer)

    def _post_until(self, receive: int) -> bool:
        self._post()
        return receive < self._posted

    def _send(self, sends: Sequence[int]) -> None:
        for send in sends:
            peer, spans = self.plan.leaving[send]
            if len(spans) == 1:
                content = self._view(spans[0])
            else:
                content = np.concatenate([np.empty(0, self.dtype), *map(self._view, spans)])
            self._sends[send] = self.transport.start_send(content, peer, self.tag)
            self._sent[send] = 1

    def _have_left(self, sends: Sequence[int]) -> bool:
        for send in sends:
            request = self._sends.get(send)
            if request is None:
                if not self._sent[send]:
                    return False
            elif request.test():
                del self._sends[send]
            else:
                return False
        return True

    def _view(self, span: Span) -> Array:
        buffer, start, stop = span
        return self._buffers[buffer][start:stop]

    def _add(self, each: Sum) -> None:
        into = self._view(each.into)
        sources = each.sources
        if len(sources) == 1:
            np.copyto(into, self._view(sources[0]))
            return
        assert self._ufunc is not None
        if len(sources) == 2 and self._direct:
            self._ufunc(self._view(sources[0]), self._view(sources[1]), out=into)
        else:
            reduce_rows(self._ufunc, [self._view(source) for source in sources], into)

    def _close(self) -> None:
        self.finished = True
        for buffer in self._taken:
            self._memory.give(buffer)
        self._taken.clear()
        self._buffers.clear()
