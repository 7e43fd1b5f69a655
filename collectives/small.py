"""Short collectives on one node: each is one call of machine code, from the record to the result (`machine_short.py`).

    all_reduce, 2 ranks     record of number 57    mine -> slot 25    ARRIVED = 57
                            his ARRIVED >= 57, his record as mine     slot 25 of both, added up -> target

The same steps, records, slots and results as the functions of `staged.py`, so ranks may meet that do it differently.
All of the source is in the own slot before the target is written, so the two may overlap or be one. What the machine
code does not do comes back to Python: to wait for long, to look at arrays that are not like those it is made for, and
sums other than of float32 and float64, which NumPy makes out of the slots.

Where there is no machine code, the same in Python, step by step. Only after the first collectives, which are compared
(`Node.traced`).
"""

import contextvars
import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives import records
from dtrain.collectives.dtypes import OPERATIONS, Array, accumulator, address, starts
from dtrain.collectives.flags import Peers
from dtrain.collectives.forms import NOTHING, destination
from dtrain.collectives.letters import HEAD, LENGTH, Block
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.machine_short import AGAIN, ANOTHER, LATE, NOT_FREE, UNLIKE, WAIT, WORD, WORDS
from dtrain.collectives.node import Node
from dtrain.collectives.records import NO_PLACE, Record
from dtrain.collectives.staging import SHORT, Ring, ring_for

_OCTET = np.dtype(np.uint8)
_AS_IN_C, _ALIGNED, _WRITABLE = 0x1, 0x100, 0x400  # NumPy's flags of an array
READ, WRITE = _AS_IN_C | _ALIGNED, _AS_IN_C | _ALIGNED | _WRITABLE
Row = tuple[int, int, int, int]
"""An address or 0: the array of the call; to take, the rank whose slot it is; where it begins there, where in the
target, bytes."""


class Like(NamedTuple):
    """What an array of a call is like."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def words(self, flags: int) -> list[int]:
        """For machine code."""
        return [id(np.ndarray), id(self.dtype), flags, len(self.shape), *self.shape]

    def fits(self, array: Array, writable: bool) -> bool:
        """For Python."""
        alike = type(array) is np.ndarray and array.dtype is self.dtype and array.shape == self.shape
        return alike and (array.flags.carray if writable else array.flags.c_contiguous and array.flags.aligned)


class Short:
    """One collective that comes again: `run(source, target)`, and `finish` if that is not all."""

    def __init__(
        self,
        node: Node,
        record: Record,
        source: Like,
        target: Like | None,
        ring: Ring = SHORT,
        give: Sequence[Row] = (),
        peers: Peers | None = None,
    ) -> None:
        """Target None: nothing is written, source is given twice. give: from the source into my slot. peers: whom to
        wait for; by default everybody.
        """
        self._node, self._ring, self._source, self._target = node, ring, source, target
        self._record, self._give = record, give
        self._take: Sequence[Row] = ()
        self._root, self._head = 0, np.empty(0, np.uint8)
        self._peers = node.peers if peers is None else peers
        self.then: Callable[[Array], object] | None = None
        """What else to do with the target."""
        self._slots = [address(slot) for slot in node.slots(0, _OCTET, ring)]
        self._words = np.zeros(WORDS, np.int64)
        self._kept: list[Any] = []  # to which the words point
        self._code, self._function = machine_code(), None
        if self._code is not None and self._code.short is not None and node.flags.meet is not None:
            self._write_words()
            self._function = self._code.short(self._words)

    def _write_words(self) -> None:
        """What machine code has to know of all this."""
        node, ring, give = self._node, self._ring, self._give
        self._set("crew", node.flags.crew(self._peers))
        self._set("all", node.flags.crew(node.peers))
        self._set("mine", node.flags.at)
        self._point("turn", node.turn)
        self._point("source", self._source.words(READ))
        self._point("target", self._source.words(READ) if self._target is None else self._target.words(WRITE))
        self._set("slot", self._slots[node.rank])
        self._set("depth", ring.depth)
        self._set("stride", ring.nbytes)
        self._point("give", [word for row in give for word in row])
        self._set("gives", len(give))
        self._words[WORD["record"] :] = *self._record, records.packed(NO_PLACE)

    @property
    def run(self) -> Callable[..., int]:
        """(source, target) -> 0, or what `finish` must be told."""
        return self._function or self._step_by_step

    def _step_by_step(self, source: Array, target: Array) -> int:
        """`run` without machine code; it waits, so nobody is ever late."""
        node, wanted = self._node, self._target or self._source
        if not (self._source.fits(source, False) and wanted.fits(target, self._target is not None)):
            return UNLIKE
        number = node.begin_record(self._record)
        shift = node.free_slot(number, self._ring) * self._ring.nbytes
        for there, begin, to, nbytes in self._give:
            ctypes.memmove(self._slots[node.rank] + shift + to, (there or address(source)) + begin, nbytes)
        node.arrive(number)
        if self._peers:
            node.await_arrived(number, self._peers)
        if len(self._head) and not np.array_equal(self.slot(self._root)[: len(self._head)], self._head):
            return ANOTHER
        for rank, begin, to, nbytes in self._take:
            ctypes.memmove(address(target) + to, self._slots[rank] + shift + begin, nbytes)
        return 0

    def take(self, rows: Sequence[Row]) -> None:
        """Rows out of the slots into the target."""
        self._take = rows
        self._point("take", [word for rank, *row in rows for word in (self._slots[rank], *row)])
        self._set("takes", len(rows))

    def expect(self, head: Array, root: int) -> None:
        """These octets at the beginning of the slot of root, or else nothing is taken, and it is ANOTHER."""
        self._head, self._root = head, root
        self._set("head", address(head))
        self._set("heads", head.nbytes // 8)
        self._set("root", self._slots[root])

    def slot(self, rank: int) -> Array:
        """The slot of a rank in the last call; it may be read until the next collective."""
        return self._node.slots(self._node.number % self._ring.depth, _OCTET, self._ring)[rank]

    def add_up(self, op: str, begin: int = 0) -> None:
        """The sum of what lies at byte `begin` of all slots into the target."""
        target, code = self._target, self._code
        assert target is not None
        count = _elements(target.shape)
        nbytes = count * target.dtype.itemsize
        if self._function and code and op == "sum" and target.dtype.isnative and target.dtype.char in code.sums:
            self._set("sum", code.parts[target.dtype.char])
            self._set("ranks", len(self._slots))
            self._set("bytes", nbytes)
            self._point("terms", [slot + begin for slot in self._slots])
            self._point("places", [0] * len(self._slots))
            return
        add, node, ring = _adder(op, target.dtype, len(self._slots)), self._node, self._ring
        views: dict[int, list[Array]] = {}

        def then(result: Array) -> None:
            index = node.number % ring.depth
            if index not in views:
                slots = node.slots(index, _OCTET, ring)
                views[index] = [slot[begin : begin + nbytes].view(target.dtype).reshape(target.shape) for slot in slots]
            add(views[index], result)

        self.then = then

    def __call__(self, source: Array, target: Array) -> None:
        """All of it."""
        found = self.run(source, target)
        if found:
            self.finish(found, source, target)
        elif self.then is not None:
            self.then(target)

    def finish(self, found: int, source: Array, target: Array) -> bool:
        """Do the rest of what `run` did not do. True: it is ANOTHER, and nothing was taken."""
        node, ring = self._node, self._ring
        if found == UNLIKE:  # strides, or a wrong target; a rank without target reads its source alone
            whole = np.empty(*self._source)
            whole[...] = source
            if self._target is None:
                self(whole, whole)
            else:
                destination(target, *self._target)
                result = np.empty(*self._target)
                self(whole, result)
                target[...] = result
            return False
        while found:
            if found == LATE:
                node.await_arrived(node.number, self._peers)
                found = self.run(source, target, WAIT)
            elif found == NOT_FREE:
                node.free_slot(node.number, ring)
                found = self.run(source, target, AGAIN)
            elif found == ANOTHER:
                return True
            else:
                raise node.reports.mismatch(self._peers[found - 1][0], node.number)
        if self.then is not None:
            self.then(target)
        return False

    def _set(self, name: str, word: int) -> None:
        self._words[WORD[name]] = word

    def _point(self, name: str, words: Any) -> None:
        table = np.asarray(words, np.int64)
        self._kept.append(table)
        self._set(name, address(table) if table.size else 0)


def able(node: Node) -> bool:
    """Whether calls may be short ones by now. Other ranks may see it otherwise: they meet."""
    return node.number >= node.traced


def _record(name: str, op: str, dtype: np.dtype[Any] | None, count: int, extra: int = 0) -> Record:
    return records.record(name, "staged", op, dtype, count, NO_PLACE, extra)


def barrier(node: Node) -> Short:
    """Return when all ranks have come."""
    return Short(node, _record("barrier", "", None, 0), Like(NOTHING.shape, NOTHING.dtype), None)


# Sums


def _adder(op: str, dtype: np.dtype[Any], size: int) -> Callable[[list[Array], Array], object]:
    """Target = the sum of the parts, in their order. A sum beyond the largest number is infinity, as in MPI: never a
    warning on one rank.
    """
    operation, wide = OPERATIONS[op], accumulator(dtype)

    def add_wide(parts: list[Array], target: Array) -> None:
        total = parts[0].astype(wide)
        for part in parts[1:]:
            operation(total, part.astype(wide), out=total)
        target[...] = total

    def add(parts: list[Array], target: Array) -> None:
        operation(parts[0], parts[1], out=target)
        for part in parts[2:]:
            operation(target, part, out=target)

    chosen = add if wide == dtype else add_wide
    if dtype.kind not in "fc" and wide == dtype:
        return chosen
    quiet = contextvars.copy_context()  # entered in 0.1 us, where `np.errstate` takes 2
    quiet.run(np.seterr, all="ignore")
    return lambda parts, target: quiet.run(chosen, parts, target)


def all_reduce(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], op: str, root: int | None = None) -> Short:
    """Target = the sum of the sources, on all ranks or on root alone."""
    name, like, count = "all_reduce" if root is None else "reduce", Like(shape, dtype), _elements(shape)
    wanted = root in (None, node.rank)
    record = _record(name, op, dtype, count, -1 if root is None else root)
    give = [(0, 0, 0, count * dtype.itemsize)]
    call = Short(node, record, like, like if wanted else None, give=give, peers=None if wanted else [])
    if wanted:
        call.add_up(op)
    return call


def reduce_scatter(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], op: str, rows: Sequence[int]) -> Short:
    """Target = the sum of the sources' blocks for this rank; rows: of each block."""
    width, item = _elements(shape[1:]), dtype.itemsize
    counts = [count * width for count in rows]
    ring = ring_for(node.size * max(counts) * item)
    portion = ring.portion(node.size, item) * item
    record = _record("reduce_scatter", op, dtype, sum(counts), hash(tuple(counts)))
    begins = enumerate(zip(starts(counts), counts, strict=True))
    give = [(0, begin * item, rank * portion, count * item) for rank, (begin, count) in begins]
    target = Like((rows[node.rank], *shape[1:]), dtype)
    call = Short(node, record, Like(shape, dtype), target, ring, give)
    if counts[node.rank]:
        call.add_up(op, node.rank * portion)
    return call


# Movement, of the bytes as they are


def all_gather(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], root: int | None = None) -> Short:
    """Target = the sources, one after another, on all ranks or on root alone."""
    count = _elements(shape)
    nbytes = count * dtype.itemsize
    name = "all_gather" if root is None else "gather"
    record = _record(name, "", None, 0, hash((tuple([count] * node.size), -1 if root is None else root)))
    give = [(0, 0, 0, nbytes)]
    if root not in (None, node.rank):
        return Short(node, record, Like(shape, dtype), None, ring_for(nbytes), give, [])
    target = Like((shape[0] * node.size, *shape[1:]), dtype)
    call = Short(node, record, Like(shape, dtype), target, ring_for(nbytes), give)
    call.take([(rank, 0, rank * nbytes, nbytes) for rank in range(node.size)])
    return call


def all_to_all(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Short:
    """Target = the blocks for this rank of all sources."""
    length, like = _elements(shape) * dtype.itemsize // node.size, Like(shape, dtype)
    ring = ring_for(node.size * length)
    portion = ring.portion(node.size, 1)
    give = [(0, rank * length, rank * portion, length) for rank in range(node.size)]
    call = Short(node, _record("all_to_all", "", None, 0, length), like, like, ring, give)
    call.take([(rank, node.rank * portion, rank * length, length) for rank in range(node.size)])
    return call


def broadcast(node: Node, shape: tuple[int, ...], dtype: np.dtype[Any], root: int) -> Short:
    """Target of every rank = source of root. Nobody waits for anybody but root."""
    like, count = Like(shape, dtype), _elements(shape)
    nbytes = count * dtype.itemsize
    give = [(0, 0, 0, nbytes)] if node.rank == root else []
    record = _record("broadcast", "", dtype, count, root)
    call = Short(node, record, like, like, ring_for(nbytes), give, node.only(root))
    call.take([(root, 0, 0, nbytes)])
    return call


def scatter(node: Node, root: int, head: Array, block: Block, source: Like) -> Short:
    """A letter that came before, as its broadcast: root gives the head and the source, and each takes its block, if the
    head is this one.
    """
    give: list[Row] = []
    if node.rank == root:
        nbytes = _elements(source.shape) * source.dtype.itemsize
        give = [(address(head), 0, 0, HEAD), (0, 0, HEAD, nbytes)]
    record = _record("broadcast", "", _OCTET, LENGTH, root)
    call = Short(node, record, source, Like(block.shape, block.dtype), ring_for(LENGTH), give, node.only(root))
    call.expect(head, root)
    call.take([(root, block.begin, 0, block.nbytes)])
    return call


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
