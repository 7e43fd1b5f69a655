"""Buckets summed exactly inside each node and compressed between the nodes.

    node 0   rank 0  │ bucket │ reduce_scatter │▓▓│  │ exchange with node 1, slice 0 │▓▓│  │ all_gather │▓▓▓▓▓│
             rank 1  │ bucket │   (exact)      │  │▓▓│ exchange with node 1, slice 1 │  │▓▓│ in the node │▓▓▓▓▓│
    node 1   rank 2  │ bucket │       "        │▓▓│  │               "               │▓▓│  │     "      │▓▓▓▓▓│

Every rank of a node drives a slice of its own, its lane, so the network is used by all of them. Where nodes have
different numbers of ranks, the first ones of each drive, as many as the smallest node has. The buffers lie in the
window of the node: the first and the last stage copy nothing.

A stage of a bucket waits for the one before when the next bucket is posted, in the same order on all ranks: stage 2 of
bucket 1 runs beside the backward of the layers of bucket 2.

State: the residual of a node is saved as a tensor (nodes, elements) for each parameter, of which each rank holds its
slice. Fewer or more nodes than wrote it share the sum evenly: nothing that was not sent yet is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

import numpy as np

from dtrain.arrays import Array
from dtrain.checkpoint import Piece, Reader
from dtrain.collectives import Communicator, Work, single, wait_all
from dtrain.flat_group import FlatGroup
from dtrain.mesh import Mesh
from dtrain.strategies.compression.interface import Compression, Part

KIND = "strategy"
STEPS = "compression.steps"


class BetweenNodes:
    """The compressor of `DistributedDataParallel`."""

    def __init__(self, compression: Compression, everywhere: bool = False) -> None:
        """`everywhere`: take every rank for a node of its own."""
        self.compression, self.everywhere = compression, everywhere
        self.steps = 0

    def open(self, comm: Communicator, mesh: Mesh) -> Communicator | None:
        """The communicator of my node, for shared memory; None where all ranks are on one. Collective over `comm`."""
        names = list(range(comm.size)) if self.everywhere else list(comm.transport.nodes)
        nodes = list(dict.fromkeys(names))
        self.num_nodes, self.node = len(nodes), nodes.index(names[comm.rank])
        if self.num_nodes == 1:
            return None
        self.drivers = min(names.count(node) for node in nodes)
        if self.everywhere:
            self.inner, self.lane = single(), comm
        else:
            local_rank = names[: comm.rank].count(names[comm.rank])
            inner = comm.split(self.node, name=f"{comm.name} in node")
            lane = comm.split(local_rank, name=f"{comm.name} of nodes")
            assert inner is not None and lane is not None
            self.inner, self.lane = inner, lane
            mesh.keep(inner)
            mesh.keep(lane)
        # Ranks that differ in other axes hold parts of parameters under the same names.
        others = {axis: mesh.coordinates[axis] for axis, size in mesh.sizes.items() if size > 1 and axis != "dp"}
        self.suffix = "".join(f".{axis}{coordinate}" for axis, coordinate in others.items())
        return comm if self.everywhere else self.inner

    def attach(self, buckets: Sequence[tuple[FlatGroup, slice]]) -> None:
        """Cut every bucket, and make the state of my parts."""
        self.buckets = buckets
        self.counts = [self._cut(group, where) for group, where in buckets]
        self.parts = []
        for number, ((group, bucket), counts) in enumerate(zip(buckets, self.counts, strict=True)):
            start = bucket.start + sum(counts[: self.inner.rank])
            where = slice(start, start + counts[self.inner.rank])
            wide = np.dtype(np.float32) if group.dtype.itemsize == 2 else group.dtype
            part = Part(number, group.grad[where], group.pieces(where), wide)
            if self.compression.feedback:
                part.residual = np.zeros(part.gradient.size, wide)
            if part.gradient.size:
                self.compression.attach(part)
            self.parts.append(part)
        self._under_way: list[Iterator[list[Work]]] = []
        self._waiting: list[list[Work]] = []

    def start(self, number: int) -> None:
        """Begin to sum a bucket, and bring those before it one stage further. Collective."""
        self._advance()
        self._under_way.append(self._stages(number))
        self._waiting.append(next(self._under_way[-1]))

    def finish(self) -> None:
        """Bring all buckets to their end, side by side. Collective."""
        while self._under_way:
            self._advance()
        self.steps += 1

    def sent(self) -> int:
        """Bytes that this rank sends to other nodes in a step, by the formula of the compression."""
        return sum(self.compression.sent(part, self.num_nodes) for part in self.parts if part.gradient.size)

    def uncompressed(self) -> int:
        """Bytes that it would send as they are: 2 (N-1)/N of its parts."""
        return sum(2 * (self.num_nodes - 1) * part.gradient.nbytes // self.num_nodes for part in self.parts)

    def notes(self) -> list[str]:
        """Between how many nodes, and how much less is sent."""
        name = self.compression.name
        if self.num_nodes == 1:
            return [
                f"{name}: all ranks are on one node, nothing is compressed; parallel.compression.everywhere=true does"
            ]
        sent, plain = self.sent(), self.uncompressed()
        between = f"{self.num_nodes} {'ranks' if self.everywhere else 'nodes'}"
        less = f"{sent / plain:.1%} of {plain:,}" if plain else "nothing to send"
        return [f"{name} between {between}: this rank sends {sent:,} bytes a step, {less}"]

    # The stages of a bucket

    def _stages(self, number: int) -> Iterator[list[Work]]:
        (group, where), part, counts = self.buckets[number], self.parts[number], self.counts[number]
        bucket = group.grad[where]
        if self.inner.size > 1:
            yield [self.inner.reduce_scatter_async(bucket, out=part.gradient, counts=counts)]
        if part.gradient.size:
            yield from self.compression.exchange(part, self.lane, self.steps)
        else:  # as many stages as the others, so that the next collective in the node finds the same order
            yield from ([] for _ in range(self.compression.stages))
        if self.inner.size > 1:
            yield [self.inner.all_gather_async(part.gradient, out=bucket, counts=counts)]

    def _advance(self) -> None:
        """One stage for every bucket under way: in the order of the buckets, so that all ranks do the same."""
        still, works = [], []
        for stages, waiting in zip(self._under_way, self._waiting, strict=True):
            wait_all(waiting)
            following = next(stages, None)
            if following is not None:
                still.append(stages)
                works.append(following)
        self._under_way, self._waiting = still, works

    def _cut(self, group: FlatGroup, bucket: slice) -> list[int]:
        """Elements of each rank of my node: even slices for the drivers, between parameters if it must be."""
        start, stop = bucket.start, bucket.stop
        cuts = [start + (stop - start) * driver // self.drivers for driver in range(1, self.drivers)]
        if self.compression.whole_parameters:
            inside = [where.start for where in group.slices.values() if start < where.start < stop]
            allowed = [start, *inside, stop]
            cuts = [min(allowed, key=lambda border, cut=cut: (abs(border - cut), border)) for cut in cuts]  # type: ignore[misc]
        edges = [start, *cuts, stop]
        counts = [after - before for before, after in pairwise(edges)]
        return counts + [0] * (self.inner.size - self.drivers)

    # Checkpoints

    def state(self) -> list[Piece]:
        """Residuals, other state, and the number of steps, which the lots of stochastic rounding depend on."""
        pieces = [Piece(STEPS, np.array([self.steps], np.int64), (0,), (1,), KIND)]
        for name, start, shape, array in self._residuals():
            pieces.append(Piece(name, array[None], start, shape, KIND))
        for name, array in self._factors():
            pieces.append(Piece(name, array, (0,) * array.ndim, array.shape, KIND))
        return pieces

    def load_state(self, reader: Reader) -> None:
        """Take back what is there; a checkpoint of a run without this compression has nothing, and so it begins."""
        held = set(reader.names(KIND))
        if STEPS in held:
            self.steps = int(reader.tensor(STEPS)[0])
        for name, start, shape, array in self._residuals():
            array[...] = 0
            if name not in held or reader.entry(name).shape[1:] != shape[1:]:
                continue
            writers = reader.entry(name).shape[0]
            if writers == self.num_nodes:
                array[...] = reader.read(name, start, (1, array.size))[0]
            else:
                everybody = reader.read(name, (0, start[1]), (writers, array.size))
                array[...] = everybody.sum(0) / self.num_nodes
        for name, array in self._factors():
            if name in held and reader.entry(name).shape == array.shape:
                array[...] = reader.tensor(name)

    def _residuals(self) -> Iterator[tuple[str, tuple[int, int], tuple[int, int], Array]]:
        """Name, where it begins in the global tensor, its global shape, and my slice, a view."""
        for part in self.parts:
            for piece in part.pieces if part.residual is not None else ():
                assert part.residual is not None
                size = prod(self.buckets[part.number][0].shapes[piece.name])
                yield (
                    f"{piece.name}.residual{self.suffix}",
                    (self.node, piece.inside.start),
                    (self.num_nodes, size),
                    part.residual[piece.where],
                )

    def _factors(self) -> Iterator[tuple[str, Array]]:
        for part in self.parts:
            for kind, arrays in part.state.items():
                for name, array in arrays.items():
                    yield f"{name}.{kind}{self.suffix}", array
