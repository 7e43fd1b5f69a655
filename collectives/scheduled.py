"""Schedules as collectives of a communicator: bound to its ranks, planned for the arrays, run by messages.

    Choice ──► Schedule ──► Plan ──► Run         `choices.py`: the row and its parameters; `schedules/`: the rest
               kept         kept     one per call

A Channel, one per communicator, has messages of its own (a duplicate of the transport, one tag per call), so that calls
in flight, other collectives and the user's messages never meet.

On one node every call is announced in the records of the node. Nobody waits there for the others: with the first
message of a peer its record is looked at, and again whenever a message is late, so a rank that does something else is
named before its data is used. Counted are the steps in which the rank sends or receives, and the bytes of the messages.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.collectives import choices
from dtrain.collectives.call import Call
from dtrain.collectives.choices import Choice
from dtrain.collectives.counters import Volume
from dtrain.collectives.dtypes import Array
from dtrain.collectives.progress import Progress
from dtrain.collectives.schedules.executor import Memory, Run
from dtrain.collectives.schedules.plan import Plan
from dtrain.collectives.schedules.planner import make_plan
from dtrain.collectives.schedules.prover import prove
from dtrain.collectives.schedules.schedule import Algorithm, Schedule, bind
from dtrain.collectives.schedules.specification import PROMISES
from dtrain.collectives.work import Request

if TYPE_CHECKING:
    from dtrain.collectives.node import Node
    from dtrain.collectives.transport import Transport

KNOWN_PLANS = 256
TAGS = 1024
IN_FLIGHT = TAGS // 2
SHORTEST_CHUNK = 16 * 1024  # bytes: where `segments` is not given, shorter vectors are cut into fewer


class Channel:
    """What one communicator needs to run schedules."""

    def __init__(
        self,
        transport: "Transport",
        connect: "Callable[[], Transport]",
        progress: Progress,
        timeout: float,
    ) -> None:
        """connect: makes the transport of the messages; collective, called with the first schedule that runs."""
        self._ranks = transport
        self._connect = connect
        self._transport: Transport | None = None
        self._progress = progress
        self._timeout = timeout
        self._schedules: dict[Any, Schedule] = {}
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._memory = Memory()
        self._number = 0
        self._open: deque[_Started] = deque()
        self._forwards: dict[int, bool] = {}

    def close(self) -> None:
        """Collective: give the transport back."""
        while self._open:
            self._progress.wait(self._open.popleft())
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        self._plans.clear()
        self._memory = Memory()

    def schedule(self, call: Call, choice: Choice) -> Schedule:
        """The schedule with its parameters; ValueError where it is not possible between these ranks."""
        if not choice.parameters and (found := self._schedules.get(_brief(call, choice))) is not None:
            return found
        defaults = choice.row.parameters if isinstance(choice.row, Algorithm) else {}
        parameters = dict(choice.parameters)
        if "segments" in defaults and "segments" not in parameters:
            parameters["segments"] = max(1, min(defaults["segments"], _nbytes(call) // SHORTEST_CHUNK))
        if "local" in defaults and "local" not in parameters:
            parameters["local"] = ranks_of_a_node(self._ranks.nodes)
        # Which row it is: two functions of the user may have one name. The schedule keeps the row alive.
        key = (choice.collective, choice.name, id(choice.row), call.root, *parameters.items())
        found = self._schedules.get(key)
        if found is None:
            root = call.root if PROMISES[choice.collective].rooted else 0
            found = bind(choice.collective, choice.name, choice.row, self._ranks.size, root, **parameters)
            if choice.own:
                prove(found)
            self._schedules[key] = found
            if not defaults:
                self._schedules[_brief(call, choice)] = found
        return found

    def start(self, call: Call, choice: Choice) -> "_Started":
        """Start a call; its bytes go into `call.moved`."""
        schedule = self.schedule(call, choice)
        spec = schedule.specification
        node, number = call.node, 0
        if node is not None:
            extra = hash((call.root, *(() if spec.promise.pairs else call.counts)))
            number = node.note(choice.collective, choice.text, call.op, _announced(call, choice.collective), extra)
        if self._transport is None:
            if node is not None:
                node.await_arrived(number)  # all ranks make the duplicate, or a wrong one is named here
            self._transport = self._connect()
        dtype = call.target.dtype if choice.collective in ("broadcast", "scatter") else call.source.dtype
        plan = self._plan(call, choice, schedule, dtype)
        call.moved = Volume(plan.volume[0], plan.volume[1] * dtype.itemsize, plan.volume[2] * dtype.itemsize)
        source, target = call.source, call.target
        if not plan.lengths[0]:
            source = np.empty(0, dtype)  # broadcast and scatter: who is not root brings nothing, of any dtype
        elif source is not target and np.may_share_memory(source, target):
            source = source.copy()
        self._number += 1
        self._trim()
        run = Run(
            plan, self._transport, source, target, call.op, self._number % TAGS, self._memory,
            None if node is None else _Check(node, number),
        )  # fmt: skip
        started = _Started(run, self, f"{choice.collective} ({choice.text})", node, number)
        self._open.append(started)
        return started

    def _trim(self) -> None:
        """Forget what is over; so many at once that a tag comes again while it is in use wait here."""
        while self._open and (self._open[0].run.finished or len(self._open) >= IN_FLIGHT):
            self._progress.wait(self._open.popleft())

    def _plan(self, call: Call, choice: Choice, schedule: Schedule, dtype: np.dtype[Any]) -> Plan:
        pairs = schedule.specification.promise.pairs
        counts: Any = tuple(call.counts) if call.counts else _length(call)
        in_place = call.source is call.target
        if pairs and not call.alike:
            counts = self._all_counts(call, schedule)
        key = (id(schedule), counts, dtype.itemsize, in_place, choice.segment_bytes)
        plan = self._plans.get(key)
        if plan is None:
            matrix = np.array(counts, np.int64)
            if pairs:
                matrix = np.tile(matrix, schedule.size) if call.alike else matrix
                matrix = matrix.reshape(schedule.size, schedule.size)
            lengths = schedule.specification.lengths(matrix)
            plan = make_plan(schedule, self._ranks.rank, lengths, dtype.itemsize, in_place, choice.segment_bytes)
            self._plans[key] = plan
            if len(self._plans) > KNOWN_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _all_counts(self, call: Call, schedule: Schedule) -> tuple[int, ...]:
        """Elements from every rank to every rank, where this rank knows its row and its column.

        Who forwards blocks of others must know their lengths: then all ranks tell their rows first.
        """
        size, rank = self._ranks.size, self._ranks.rank
        matrix = np.zeros((size, size), np.int64)
        if id(schedule) not in self._forwards:
            self._forwards[id(schedule)] = forwards(schedule)
        if self._forwards[id(schedule)]:
            row, everyone = np.array(call.counts, np.int64), np.empty(size * size, np.int64)
            inner = Call(call.transport, None, row, everyone, counts=[size] * size, channel=call.channel)
            choices.find("all_gather", "bruck").run(inner)
            return tuple(everyone.tolist())
        matrix[:, rank], matrix[rank] = call.out_counts, call.counts
        return tuple(matrix.reshape(-1).tolist())


class _Started(Request):
    """A schedule under way."""

    def __init__(self, run: Run, channel: Channel, what: str, node: "Node | None", number: int) -> None:
        self.run = run
        self._channel, self._what = channel, what
        self._node, self._number = node, number

    def test(self) -> bool:
        """Whether it is over; goes on as far as it can."""
        return self.run.test()

    def wait(self) -> None:
        """Return when it is over; meanwhile everything else that is open goes on."""
        if self.run.test():
            return
        progress, transport = self._channel._progress, self._channel._ranks
        if transport.name == "threads" and self._node is None and not progress.busy():
            self.run.wait()  # a thread that looks again and again keeps the others from running
            return
        others = lambda: progress.poll() if progress.busy() else None  # noqa: E731
        self.run.wait_patiently(not transport.crowded, self._channel._timeout, others, self._look, self._what)

    def _look(self) -> None:
        """Has somebody come to something else?"""
        if self._node is not None:
            self._node.reports.check(self._number)


class _Check:
    """Looks at the record of each peer once, when its first message has come."""

    def __init__(self, node: "Node", number: int) -> None:
        self._node, self._number = node, number
        self._seen: set[int] = set()

    def __call__(self, peer: int) -> None:
        if peer not in self._seen:
            self._seen.add(peer)
            self._node.reports.check(self._number, self._node.only(peer))


def ranks_of_a_node(nodes: list[int]) -> int:
    """How many ranks every node has, if they all have as many and one after the other; 0: it is not so."""
    local = nodes.count(nodes[0])
    several = local < len(nodes) and len(nodes) % local == 0
    blocks = [nodes[begin : begin + local] for begin in range(0, len(nodes), local)]
    return local if several and all(len(set(block)) == 1 for block in blocks) else 0


def forwards(schedule: Schedule) -> bool:
    """Whether any rank of an all_to_all carries blocks that are neither from it nor for it."""
    size = schedule.size
    return any(
        rank not in divmod(chunk, size)
        for rank in range(size)
        for step in schedule.of(rank)
        for chunks in (*(send.chunks for send in step.sends), *(receive.chunks for receive in step.receives))
        for chunk in chunks
    )


def _brief(call: Call, choice: Choice) -> tuple[str, int, int]:
    """Which schedule it is where the row has no parameters. One function may serve several collectives."""
    return choice.collective, id(choice.row), call.root


def _length(call: Call) -> int:
    return max(call.source.size, call.target.size)


def _nbytes(call: Call) -> int:
    return max(call.source.nbytes, call.target.nbytes, sum(call.counts) * call.source.itemsize)


def _announced(call: Call, collective: str) -> Array | None:
    """The array whose length and dtype must be the same on all ranks."""
    if collective in ("all_gather", "all_to_all", "gather", "scatter", "barrier"):
        return None
    return call.target if collective == "broadcast" else call.source
