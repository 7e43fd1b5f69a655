"""What a communicator is, apart from its collectives: ranks, shared memory, groups of groups, counters, open works."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import numpy as np

from dtrain.collectives import algorithms, device, staged
from dtrain.collectives.algorithms import Algorithm
from dtrain.collectives.arena import Arena, Place
from dtrain.collectives.background import Background
from dtrain.collectives.call import Call
from dtrain.collectives.closed import Closed
from dtrain.collectives.conveyor import Conveyor
from dtrain.collectives.counters import Counters, Last, Volume
from dtrain.collectives.desync import Desync
from dtrain.collectives.device import on_gpu
from dtrain.collectives.device_works import Device
from dtrain.collectives.dtypes import Array
from dtrain.collectives.levels import Levels, has_levels
from dtrain.collectives.node import Node
from dtrain.collectives.progress import Progress
from dtrain.collectives.transport import Transport
from dtrain.collectives.tuning import Table, Tuning
from dtrain.collectives.waiting import Patience, timeout_seconds
from dtrain.collectives.work import Deferred, Work

if TYPE_CHECKING:
    from dtrain.collectives.choices import Own
    from dtrain.collectives.scheduled import Channel

BARRIER = Volume(1, 0, 0)


class Group:
    """`size` ranks, of which this process is number `rank`."""

    def __init__(self, transport: Transport, timeout: float | None = None, progress: Progress | None = None) -> None:
        """`timeout`: seconds after which a wait in shared memory ends with a report; see `timeout_seconds`.

        `progress`: of the communicator from which this one was split.
        """
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.hosts = transport.hosts
        self.host = transport.hosts[transport.rank]
        here = [rank for rank, node in enumerate(transport.nodes) if node == transport.nodes[transport.rank]]
        self.local_rank = here.index(transport.rank)
        self.local_size = len(here)
        self.name = "world"
        """In tables and messages; a mesh gives the names of its axes."""
        self.counters = Counters()
        self.tuning: Tuning | None = None
        """What was measured on this machine; None: `auto` goes by the built-in rule."""
        self._timeout = timeout_seconds(timeout)
        self._shares = transport.shares and 1 < self.size == self.local_size
        self._node: Node | None = None
        self._has_levels = has_levels(transport)
        self._levels: Levels | None = None
        self._progress = progress or Progress()
        self._progress.crowded |= transport.crowded
        self._progress.join(self)
        self._path = "world"  # the same on all ranks of this communicator, and of no other
        self._splits = 0
        self._desync: Desync | None = None
        self._deferred: deque[Deferred] = deque()
        self._shared_homes: list[Array] = []
        self._gpu: Device | None = None
        self._channel: Channel | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.size} over {self.transport.name}>"

    @property
    def node(self) -> Node | None:
        """The shared memory of this communicator, if all its ranks are on one node. The first access is collective."""
        if self._node is None and self._shares:
            self._node = Node(self.transport, Patience(self.transport.crowded, self._timeout), self._progress)
        return self._node

    @property
    def levels(self) -> Levels | None:
        """Both levels of a communicator over several nodes: `inner`, the ranks of my node, and `lane`, those that are
        on their nodes what I am on mine. None on one node, or where every node has one rank. The first access is
        collective.
        """
        if self._levels is None and self._has_levels:
            self._drain()
            patience = Patience(self.transport.crowded, self._timeout)
            name = f"rank {self.rank} of {self.size}"
            self._levels = Levels(self.transport, patience, self._progress, self._part, name)
        return self._levels

    def _part(self, color: int) -> Any:
        return self.split(color)

    @property
    def last(self) -> Last | None:
        """The collective that ran or was started last on this communicator: which, how, and on how many bytes."""
        return None if self.counters.last is None else Last(*self.counters.last)

    @property
    def gpu(self) -> Device:
        """What moves CuPy arrays. The first access is collective."""
        if self._gpu is None:
            self._gpu = Device(cast(Any, self))
        return self._gpu

    def split(self, color: int | None, key: int | None = None, name: str | None = None) -> Self | None:
        """The communicator of the ranks with my color, ordered by key (default: by rank); None where color is None.

        name: what it is called in tables; default: the name of this one and the color.
        """
        if color is not None and color < 0:
            raise ValueError(f"color={color}: allowed: None or a number from 0")
        self._meet()
        self._check("split", "native")
        self._splits += 1
        part = self.transport.split(color, self.rank if key is None else key)
        if part is None:
            return None
        child = type(self)(part, self._timeout, self._progress)
        child.name = f"{self.name}/{color}" if name is None else name
        child.counters.follow(self.counters)
        child._path = f"{self._path}/{self._splits}.{color}"
        child.tune(None if self.tuning is None else self.tuning.table)
        return child

    def tune(self, table: Table | None) -> None:
        """Let this table decide what `auto` is, here and in what is split from here; all ranks give the same one."""
        self.tuning = None if table is None or self.size == 1 else Tuning(table, self.transport.nodes)

    def close(self) -> None:
        """Give all memory and handles back; the communicator is not used afterwards.

        Drop the arrays of `empty` before: their memory goes only when no rank has any of them any more.
        """
        self._settle()
        self._shared_homes.clear()
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._node is not None:
            self._node.finish()
        self._meet()
        if self._node is not None:
            self._node.close()
            self._node = None
        if self._levels is not None:
            self._levels.close()
            self._levels = None
        self._shares = self._has_levels = False
        self._desync = None
        self.transport.close()
        if not isinstance(self.transport, Closed):
            self.transport = cast(Any, Closed(self.transport, self.name))

    def report_to(self, folder: str | Path) -> None:
        """Where this rank's file goes when the job hangs (`watchdog.py`); default: the working directory."""
        if self._progress.watchdog is not None:
            self._progress.watchdog.folder = os.path.abspath(folder)

    def rest(self) -> None:
        """Stop the threads that call the transport beside this one: for who goes on without it."""
        for thread in (self._progress.watchdog, self._progress.background):
            if thread is not None:
                thread.stop()

    def use_progress_thread(self, on: bool) -> None:
        """Switch the thread of `background.py` on or off, on this rank, for all communicators of its world."""
        if self._progress.background is not None:
            self._progress.background.stop()
        self._progress.background = Background(self._progress) if on else None

    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job at once with exit status `code`; not collective."""
        self.transport.abort(code)

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32, like: Any = None) -> Array:
        """A new array of undefined content, in the node's shared memory if possible: the home of what travels often.

        Every rank gets its own array; the peers on its node see it, so that collectives on it (or on slices; for
        reductions the same slice on all ranks) need no copy. All ranks must bring arrays from here then, or none. The
        array may die at any time, on each rank for itself; its memory is used again when it is dead on all.

        like: a CuPy array asks for one on the current GPU instead; nothing there is shared.
        """
        form = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(length < 0 for length in form):
            raise ValueError(f"shape={shape}: allowed: lengths from 0")
        if np.dtype(dtype).hasobject:
            raise ValueError(f"dtype={dtype}: Python objects cannot travel")
        if like is not None and on_gpu(like):
            return device.empty(form, np.dtype(dtype))  # type: ignore[no-any-return]
        arena = self._arena(make=True)
        if arena is None:
            return np.empty(form, dtype)
        self._settle()
        self._drain()
        return arena.allocate(form, np.dtype(dtype))

    def empty_shared(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array | None:
        """One new array that all ranks see, of undefined content; None where they are not on one node.

        Whoever writes an element says so by a `barrier` before another rank reads it. The array lives as long as the
        communicator.
        """
        if self.size == 1:
            return np.empty(shape, dtype)
        if self.node is None:
            return None
        own = self.empty(shape, dtype)  # at the same place on every rank; of all these, that of rank 0 is used
        self._shared_homes.append(own)
        place = self.node.arena.place(own)
        assert place is not None
        return self.node.arena.part(0, place, own.size, own.dtype).reshape(own.shape)

    def barrier(self, algorithm: "str | Own" = "auto") -> None:
        """Return when all ranks have come here."""
        self._settle()
        if algorithm != "auto":
            nothing = np.empty(0, np.uint8)
            self._run(
                "barrier", algorithms.BARRIER, algorithm, Call(self.transport, self.node, nothing, nothing), empty=False
            )
            return
        if self.node is not None:
            staged.barrier(self.node)
            self.counters.add("barrier", "staged", 0, BARRIER)
        elif self.size > 1:
            self._check("barrier", "native")
            self._drain()
            self.transport.barrier()
            self.counters.add("barrier", "native", 0, BARRIER)

    # How a call is done

    def _run(
        self, name: str, table: dict[str, Algorithm], algorithm: "str | Own", call: Call, empty: bool | None = None
    ) -> None:
        """Do and count a call; nothing where there is nothing to move (`empty`, by default: no element)."""
        if (not (call.source.size or call.target.size)) if empty is None else empty:
            return
        self._bring_levels(call)
        measured = () if self.tuning is None or algorithm != "auto" else self.tuning.order(name, call)
        chosen, row = algorithms.choose(table, algorithm, call, measured)
        if call.node is None and self.size > 1:
            self._check(name, chosen, call)
            if chosen != "hierarchical":
                self._drain()
        row.run(call)
        self.counters.add(name, chosen, max(call.source.nbytes, call.target.nbytes), row.volume(call))

    def _check(self, name: str, algorithm: str, call: Call | None = None) -> None:
        """Do all ranks come to the same? On one node their records say so (`reports.py`), over several they ask."""
        if self._desync is None:
            letters = self._progress.letters
            if self._node is not None or letters is None or self.size == 1:
                return
            self._desync = Desync(self.transport, letters, self._progress, self._path, self._timeout)
        self._desync.check(name, algorithm, call)

    def _bring_levels(self, call: Call) -> None:
        call.channel = self._messages
        if self._has_levels:
            call.levels = lambda: self.levels

    def _messages(self) -> "Channel":
        """For schedules: made when the first one runs."""
        if self._channel is None:
            from dtrain.collectives.scheduled import Channel

            def connect() -> Transport:
                self._drain()
                own = self.transport.split(0, self.rank)
                assert own is not None
                return own

            self._channel = Channel(self.transport, connect, self._progress, self._timeout)
        return self._channel

    def _drain(self) -> None:
        """Finish what is under way between nodes, of all communicators: inside the MPI library nobody moves it on."""
        for queue in list(self._progress.queues):
            if isinstance(queue, Conveyor):
                queue.drain()

    # Places in the window

    def _arena(self, make: bool = False) -> Arena | None:
        """The shared memory of this node, if there is any yet or `make`."""
        if self._has_levels:
            levels = self.levels if make else self._levels
            return None if levels is None else levels.node.arena
        node = self.node if make else self._node
        return None if node is None else node.arena

    def _place(self, array: Array) -> Place | None:
        """Where the bytes of array lie in the window; None: elsewhere."""
        arena = self._arena()
        return None if arena is None or not array.dtype.isnative else arena.place(array)

    def _sum_place(self, array: Array) -> Place | None:
        """`_place`, if the peers can address single elements there."""
        place = self._place(array)
        return None if place is None or place[1] % array.itemsize else place

    def _own_block(self, counts: Sequence[int], place: Place | None) -> int | None:
        """Where my block begins in all of them; None: between nodes, such overlaps are known in the window alone."""
        return None if self.node is None and place is None else sum(counts[: self.rank])

    # Deferred work: what has no non-blocking form runs at the first wait, in the order of the start. A blocking
    # collective runs the open ones first, so that all ranks run all collectives in one order wherever they wait.

    def _defer(self, run: Callable[[], Array], result: Array) -> Work:
        deferred = Deferred(run, self._deferred)
        self._deferred.append(deferred)
        return Work(deferred, lambda: result)

    def _settle(self) -> None:
        if self._deferred:
            self._deferred[-1].wait()

    def _meet(self) -> None:
        """Before what the MPI library does alone: nobody may still wait for a slice that this rank computes."""
        self._settle()
        self._drain()
        if self._node is not None:
            staged.barrier(self._node)
