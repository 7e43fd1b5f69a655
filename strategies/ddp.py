"""Distributed data parallelism: gradients in one flat buffer, reduced in buckets while the backward goes on.

    flat gradients   │ p0  p1 │ p2  p3  p4 │ p5  p6 │        buckets are slices: nothing is packed or copied
    backward fills   ◄────────────────────────────────       last parameter first
                                            └ full: all_reduce_async, the backward goes on
                              └ full …
    reduce_gradients waits for all buckets at once.

The buffer comes from `comm.empty`: on one node it lies in a shared window and is reduced in place, without a copy.
Buckets are posted in one fixed order on all ranks, whatever order they fill in. Sent per step and rank: 2 (n-1)/n Ψ.
Gradients that are partial over cp too are summed over both axes at once.
What is cut over the axis itself, such as the tables of a recommender, has no peers to be summed with, and no bucket.
With a `Compressor` it is the one who sums a bucket; then the buffer lies where it says.

Reference: Li et al., PyTorch Distributed (VLDB 2020): buckets, hooks, no_sync, unused parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from dtrain.arrays import Array
from dtrain.checkpoint import Piece, Reader
from dtrain.collectives import Communicator, Work, wait_all
from dtrain.flat import FlatBuffers
from dtrain.flat_group import FlatGroup
from dtrain.mesh import BATCH_AXES, Mesh
from dtrain.modules import Module
from dtrain.strategy import Strategy, UnusedParametersError, unused_parameters

MEBIBYTE = 1 << 20


@dataclass(slots=True)
class Bucket:
    """A slice of the flat gradients and the parameters in it that this step has not delivered yet."""

    group: FlatGroup
    where: slice
    names: tuple[str, ...]
    missing: set[str]

    @property
    def gradient(self) -> Array:
        """A view of the flat gradients."""
        return self.group.grad[self.where]


class Compressor(Protocol):
    """Sums buckets over the ranks in another way than by all_reduce; `compression/between_nodes.py` is one."""

    def open(self, comm: Communicator, mesh: Mesh) -> Communicator | None:
        """Whose memory the flat buffers shall have; None: there is nothing to compress. Collective."""

    def attach(self, buckets: Sequence[tuple[FlatGroup, slice]]) -> None:
        """Make what is kept from step to step for these buckets, slices of flat gradients."""

    def start(self, number: int) -> None:
        """Begin the sum of a bucket; called in the same order on all ranks."""

    def finish(self) -> None:
        """Complete all sums that were begun, in place."""

    def notes(self) -> list[str]:
        """What it does here, for the log."""

    def state(self) -> list[Piece]:
        """What a checkpoint must hold for the next steps to be the same."""

    def load_state(self, reader: Reader) -> None:
        """Take it back from a checkpoint, as far as it is there."""


class DistributedDataParallel(Strategy):
    """Buckets of about `bucket_mb` MiB, each summed over the axes of the batch as soon as it is full."""

    axis = "dp"

    def __init__(self, bucket_mb: float = 4.0, compressor: Compressor | None = None) -> None:
        self.bucket_bytes = int(bucket_mb * MEBIBYTE)
        self.asked = compressor
        self.compressor = compressor  # None from `apply` on, where it has nothing to compress
        self.synchronise = True
        self.posted = 0
        self.works: list[Work] = []

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Move parameters and gradients to flat buffers, watch the gradients."""
        self.comm = mesh[BATCH_AXES]
        home = self.comm
        if self.compressor is not None:
            opened = self.compressor.open(self.comm, mesh)
            if opened is None:
                self.compressor = None
            else:
                home = opened
        self.flat = FlatBuffers(model.named_parameters(), home, mesh=mesh, join=self.compressor is None)
        self.buckets = make_buckets(self.flat, self.bucket_bytes)
        if self.compressor is not None:
            self.compressor.attach([(bucket.group, bucket.where) for bucket in self.buckets])
        for bucket in self.buckets:
            for name in bucket.names:
                self.flat.parameters[name].on_gradient(self._arrival(bucket, name))
        return model

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the backwards in this context only add up on this rank."""
        self.synchronise = False
        try:
            yield
        finally:
            self.synchronise = True

    def reduce_gradients(self, model: Module) -> None:
        """Post what the last backward did not complete, then wait for all buckets."""
        if names := unused_parameters(model):
            raise UnusedParametersError(names)
        for bucket in self.buckets[self.posted :]:
            self._post(bucket)
        wait_all(self.works)
        if self.compressor is not None:
            self.compressor.finish()
        self.works, self.posted = [], 0
        for bucket in self.buckets:
            bucket.missing = set(bucket.names)

    def notes(self) -> list[str]:
        """What the compressor does here."""
        return [] if self.asked is None else self.asked.notes()

    def state(self) -> list[Piece]:
        """What the compressor keeps from step to step."""
        return [] if self.compressor is None else self.compressor.state()

    def load_state(self, reader: Reader) -> None:
        """Give it back to the compressor."""
        if self.compressor is not None:
            self.compressor.load_state(reader)

    def _arrival(self, bucket: Bucket, name: str) -> Callable[[Array], None]:
        def arrived(gradient: Array) -> None:
            if not self.synchronise:
                return
            if name not in bucket.missing:
                raise RuntimeError(
                    f"a second gradient of {name} in one step: its bucket may be on its way already. "
                    "Run all backwards but the last within no_sync()."
                )
            bucket.missing.remove(name)
            while self.posted < len(self.buckets) and not self.buckets[self.posted].missing:
                self._post(self.buckets[self.posted])

        return arrived

    def _post(self, bucket: Bucket) -> None:
        if self.compressor is not None:
            self.compressor.start(self.posted)
        else:
            self.works.append(bucket.group.peers.all_reduce_async(bucket.gradient, out=bucket.gradient))
        self.posted += 1


def make_buckets(flat: FlatBuffers, bucket_bytes: int) -> list[Bucket]:
    """Cut the flat gradients, from the end, at parameter borders into slices of at least `bucket_bytes`.

    The last parameters come first because the backward reaches them first; a bucket is full with the first of its own.
    """
    buckets: list[Bucket] = []
    defined = {name: i for i, name in enumerate(flat.parameters)}
    for group in flat.groups:
        if group.mesh is not None and group.peers.size == 1:
            continue
        names: list[str] = []
        stop = group.grad.size
        for name in reversed(group.slices):
            names.append(name)
            start = group.slices[name].start if name != next(iter(group.slices)) else 0
            if (stop - start) * group.grad.itemsize >= bucket_bytes or start == 0:
                buckets.append(Bucket(group, slice(start, stop), tuple(names), set(names)))
                names, stop = [], start
    return sorted(buckets, key=lambda bucket: -min(defined[name] for name in bucket.names))
