"""Distributed data parallelism: gradients in one flat buffer, reduced in buckets while the backward goes on.

    flat gradients   │ p0  p1 │ p2  p3  p4 │ p5  p6 │        buckets are slices: nothing is packed or copied
    backward fills   ◄────────────────────────────────       last parameter first
                                            └ full: all_reduce_async, the backward goes on
                              └ full …
    reduce_gradients waits for all buckets at once.

The buffer comes from `comm.empty`: on one node it lies in a shared window and is reduced in place, without a copy.
Buckets are posted in one fixed order on all ranks, whatever order they fill in. Sent per step and rank: 2 (n-1)/n Ψ.

Reference: Li et al., PyTorch Distributed (VLDB 2020): buckets, hooks, no_sync, unused parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dtrain.arrays import Array
from dtrain.collectives import Work, wait_all
from dtrain.flat import FlatBuffers
from dtrain.mesh import Mesh
from dtrain.modules import Module
from dtrain.strategy import Strategy, UnusedParametersError, unused_parameters

MEBIBYTE = 1 << 20


@dataclass(slots=True)
class Bucket:
    """A slice of the flat gradients and the parameters in it that this step has not delivered yet."""

    gradient: Array
    names: tuple[str, ...]
    missing: set[str]


class DistributedDataParallel(Strategy):
    """Buckets of about `bucket_mb` MiB, each summed over the `dp` axis as soon as it is full."""

    axis = "dp"

    def __init__(self, bucket_mb: float = 4.0) -> None:
        self.bucket_bytes = int(bucket_mb * MEBIBYTE)
        self.synchronise = True
        self.works: list[Work] = []

    def apply(self, model: Module, mesh: Mesh) -> Module:
        """Move parameters and gradients to flat buffers, watch the gradients."""
        self.comm = mesh["dp"]
        parameters = model.named_parameters()
        self.flat = FlatBuffers(parameters, self.comm)
        self.buckets = make_buckets(self.flat, self.bucket_bytes)
        for bucket in self.buckets:
            for name in bucket.names:
                parameters[name].on_gradient(self._arrival(bucket, name))
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
        for bucket in self.buckets[len(self.works) :]:
            self._post(bucket)
        wait_all(self.works)
        self.works = []
        for bucket in self.buckets:
            bucket.missing = set(bucket.names)

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
            while len(self.works) < len(self.buckets) and not self.buckets[len(self.works)].missing:
                self._post(self.buckets[len(self.works)])

        return arrived

    def _post(self, bucket: Bucket) -> None:
        self.works.append(self.comm.all_reduce_async(bucket.gradient, out=bucket.gradient))


def make_buckets(flat: FlatBuffers, bucket_bytes: int) -> list[Bucket]:
    """Cut the flat gradients, from the end, at parameter borders into slices of at least `bucket_bytes`.

    The last parameters come first because the backward reaches them first.
    """
    buckets = []
    for group in flat.groups:
        names: list[str] = []
        stop = group.grad.size
        for name in reversed(group.slices):
            names.append(name)
            start = group.slices[name].start if name != next(iter(group.slices)) else 0
            if (stop - start) * group.grad.itemsize >= bucket_bytes or start == 0:
                buckets.append(Bucket(group.grad[start:stop], tuple(names), set(names)))
                names, stop = [], start
    return buckets
