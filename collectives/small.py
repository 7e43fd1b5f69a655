"""Short collectives on one node, prepared once per form: one synchronisation and as little Python as there can be.

    all_reduce, 2 ranks     number 57: record written    mine -> slot 0    slot 1 <- his    ARRIVED = 57
                            his ARRIVED >= 57, his record as mine          slot 0 + slot 1 -> target

The same steps, records, slots and results as the functions of `staged.py`, so a rank that has a form prepared meets one
that has not. What never changes from call to call is kept: views of the slots in the shape of the arrays, the record,
the words of the peers. All of the source is in the own slot before the target is written, so they may overlap, be one,
or have strides.
"""

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.dtypes import OPERATIONS, Array, accumulator, starts
from dtrain.collectives.flags import Peers
from dtrain.collectives.node import STAGE_BYTES, Node
from dtrain.collectives.records import NO_PLACE, RECORD_WORDS, RECORDS, RING, SIGNATURE, Record
from dtrain.collectives.unfinished import IN_FLIGHT
from dtrain.collectives.waiting import ARRIVED

Run = Callable[[Array, Array], None]
_OCTET = np.dtype(np.uint8)


def _record(name: str, op: str, dtype: np.dtype[Any] | None, count: int, extra: int = 0) -> Record:
    return records.record(name, "staged", op, dtype, count, NO_PLACE, extra)


class Meeting:
    """One collective that comes again: `begin`, write into the slot of `half`, `arrive`, and maybe `wait`."""

    def __init__(self, node: Node, record: Record, staged: bool = True) -> None:
        """staged: it uses a half of the staging."""
        self.begin, self.arrive = _begin(node, record, staged), node.flags.putter(ARRIVED)
        self.wait = _wait(node, record, node.peers)
        self.node = node


def _begin(node: Node, record: Record, staged: bool) -> Callable[[], int]:
    """Number, record, and my slot of the next half free: `Node.begin_record` and `Node.next_half`."""
    octets, pending, used, pack, peers = node._octets, node.works.pending, node._used, records.pack, node.peers
    signature, code, kind, count, where, extra = record
    aside, traced, first, length, ring = records.packed(NO_PLACE), node.traced, 8 * RECORDS, 8 * RECORD_WORDS, RING

    def begin() -> int:
        if pending and len(pending) >= IN_FLIGHT:
            node.works.complete(pending[0].number)
        node._number = number = node._number + 1
        at = first + length * (number % ring)
        pack(octets, at, number, signature, code, kind, count, where, extra, aside)
        if number <= traced:
            records.write_text(octets, number)
        if staged:
            node._half = half = 1 - node._half
            last = used[half]
            for _, words in peers:
                if words[0] <= last:  # ARRIVED
                    node._await(ARRIVED, last + 1)
            used[half] = number
        return number

    return begin


def _wait(node: Node, record: Record, peers: Peers) -> Callable[[int], None]:
    """`Node.await_arrived`."""
    signature, fence, traced = record[0], node.flags.fence, node.traced
    spins = range(node.flags.patience.spins)
    first, length, ring = RECORDS + SIGNATURE, RECORD_WORDS, RING

    def wait(number: int) -> None:
        slot = first + length * (number % ring)
        for rank, words in peers:
            if words[0] < number:  # ARRIVED
                for _ in spins:
                    if words[0] >= number:
                        break
                else:
                    node.await_arrived(number, peers)
                    return
            if words[slot] != signature:
                raise node.reports.mismatch(rank, number)
        if fence is not None:
            fence()
        if node._alike < traced:
            node._compare()

    return wait


def barrier(node: Node) -> Callable[[], None]:
    """Return when all ranks have come."""
    meeting = Meeting(node, _record("barrier", "", None, 0), staged=False)
    begin, arrive, wait = meeting.begin, meeting.arrive, meeting.wait

    def run() -> None:
        number = begin()
        arrive(number)
        wait(number)

    return run


# Sums


def _adder(op: str, dtype: np.dtype[Any], size: int) -> Callable[[list[Array], Array], object]:
    """Target = the sum of the parts, in their order. A sum beyond the largest number is infinity, as in MPI: never a
    warning on one rank.
    """
    operation, wide = OPERATIONS[op], accumulator(dtype)
    # Without the keyword it is 0.2 us faster; NumPy wants it for maximum and minimum.
    ufunc: Callable[..., Any] = operation if op in ("sum", "prod") else lambda x, y, out: operation(x, y, out=out)

    def add_wide(parts: list[Array], target: Array) -> None:
        total = parts[0].astype(wide)
        for part in parts[1:]:
            ufunc(total, part.astype(wide), total)
        target[...] = total

    def add(parts: list[Array], target: Array) -> None:
        ufunc(parts[0], parts[1], target)
        for part in parts[2:]:
            ufunc(target, part, target)

    chosen = add if wide == dtype else add_wide
    if dtype.kind not in "fc" and wide == dtype:
        return chosen
    quiet = contextvars.copy_context()  # entered in 0.1 us, where `np.errstate` takes 2
    quiet.run(np.seterr, all="ignore")
    within = quiet.run
    if size == 2 and wide == dtype:
        return lambda parts, target: within(ufunc, parts[0], parts[1], target)
    return lambda parts, target: within(chosen, parts, target)


def all_reduce(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], op: str, root: int | None = None) -> Run:
    """Target = the sum of the sources, on all ranks or on root alone."""
    name, count = "all_reduce" if root is None else "reduce", int(np.prod(shape, dtype=np.int64))
    meeting = Meeting(node, _record(name, op, dtype, count, -1 if root is None else root))
    begin, arrive, wait, add = meeting.begin, meeting.arrive, meeting.wait, _adder(op, dtype, node.size)
    halves = [[slot[:count].reshape(shape) for slot in node.slots(half, dtype)] for half in (0, 1)]
    mine, wanted = node.rank, root in (None, node.rank)

    def run(source: Array, target: Array) -> None:
        number = begin()
        slots = halves[node._half]
        slots[mine][...] = source
        arrive(number)
        if wanted:
            wait(number)
            add(slots, target)

    return run


def reduce_scatter(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], op: str, rows: Sequence[int]) -> Run:
    """Target = the sum of the sources' blocks for this rank; rows: of each block."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    portion = STAGE_BYTES // dtype.itemsize // node.size
    extra = hash(tuple(count * width for count in rows))
    meeting = Meeting(node, _record("reduce_scatter", op, dtype, sum(rows) * width, extra))
    begin, arrive, wait, add = meeting.begin, meeting.arrive, meeting.wait, _adder(op, dtype, node.size)
    first, mine = node.rank * portion, rows[node.rank]
    halves = []
    for half in (0, 1):
        slots = node.slots(half, dtype)
        parts = [slot[first : first + mine * width].reshape(mine, *shape[1:]) for slot in slots]
        halves.append((_scattered(slots[node.rank], portion, rows, shape[1:]), parts))

    def run(source: Array, target: Array) -> None:
        number = begin()
        put, parts = halves[node._half]
        put(source)
        arrive(number)
        wait(number)
        if mine:
            add(parts, target)

    return run


def _scattered(slot: Array, portion: int, rows: Sequence[int], shape: tuple[int, ...]) -> Callable[[Array], None]:
    """Copies the blocks of an array, of `rows` rows of this shape, into a slot, `portion` elements apart."""
    width, size = int(np.prod(shape, dtype=np.int64)), len(rows)
    if min(rows) == max(rows):
        room = slot[: size * portion].reshape(size, portion)[:, : rows[0] * width]
        form = room.shape

        def put(source: Array) -> None:
            room[...] = source.reshape(form)

        return put
    rooms = [slot[at * portion : at * portion + count * width].reshape(count, *shape) for at, count in enumerate(rows)]
    cuts = [slice(start, start + count) for start, count in zip(starts(rows), rows, strict=True)]

    def put_each(source: Array) -> None:
        for room, cut in zip(rooms, cuts, strict=True):
            room[...] = source[cut]

    return put_each


# Movement, of the bytes as they are


def _view(slot: Array, begin: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The array of this shape at byte `begin` of a slot."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return slot[begin : begin + nbytes].view(dtype).reshape(shape)


def all_gather(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], root: int | None = None) -> Run:
    """Target = the sources, one after another, on all ranks or on root alone."""
    count = int(np.prod(shape, dtype=np.int64))
    name = "all_gather" if root is None else "gather"
    extra = hash((tuple([count] * node.size), -1 if root is None else root))
    meeting = Meeting(node, _record(name, "", None, 0, extra))
    begin, arrive, wait = meeting.begin, meeting.arrive, meeting.wait
    halves = [[_view(slot, 0, shape, dtype) for slot in node.slots(half, _OCTET)] for half in (0, 1)]
    cuts = [slice(rank * shape[0], (rank + 1) * shape[0]) for rank in range(node.size)]
    mine, wanted = node.rank, root in (None, node.rank)
    own = cuts[mine]
    others = [[(cuts[rank], slots[rank]) for rank, _ in node.peers] for slots in halves]

    def run(source: Array, target: Array) -> None:
        number = begin()
        half = node._half
        halves[half][mine][...] = source
        arrive(number)
        if wanted:
            target[own] = source
            wait(number)
            for cut, slot in others[half]:
                target[cut] = slot

    return run


def all_to_all(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Run:
    """Target = the blocks for this rank of all sources; shape: of one block."""
    portion, size = STAGE_BYTES // node.size, node.size
    length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    meeting = Meeting(node, _record("all_to_all", "", None, 0, length))
    begin, arrive, wait = meeting.begin, meeting.arrive, meeting.wait
    cuts = [slice(rank * shape[0], (rank + 1) * shape[0]) for rank in range(size)]
    halves = []
    for half in (0, 1):
        slots = node.slots(half, _OCTET)
        room = slots[node.rank][: size * portion].reshape(size, portion)[:, :length].view(dtype)
        others = [(cuts[rank], _view(slots[rank], node.rank * portion, shape, dtype)) for rank, _ in node.peers]
        halves.append((room, others))
    form, own = (size, length // dtype.itemsize), cuts[node.rank]

    def run(source: Array, target: Array) -> None:
        number = begin()
        room, others = halves[node._half]
        room[...] = source.reshape(form)
        arrive(number)
        target[own] = source[own]
        wait(number)
        for cut, part in others:
            target[cut] = part

    return run


def broadcast(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], root: int) -> Run:
    """Target of every rank = source of root. Nobody waits for anybody but root."""
    count = int(np.prod(shape, dtype=np.int64))
    record = _record("broadcast", "", dtype, count, root)
    meeting = Meeting(node, record)
    begin, arrive, wait = meeting.begin, meeting.arrive, _wait(node, record, node.only(root))
    slots = [_view(node.slots(half, _OCTET)[root], 0, shape, dtype) for half in (0, 1)]

    def give(source: Array, target: Array) -> None:
        number = begin()
        slots[node._half][...] = source
        arrive(number)
        if target is not source:
            target[...] = source

    def take(source: Array, target: Array) -> None:
        number = begin()
        arrive(number)
        wait(number)
        target[...] = slots[node._half]

    return give if node.rank == root else take
