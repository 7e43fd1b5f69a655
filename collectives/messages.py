"""Messages between two ranks: send, recv, both at once, and what is started. Only these two ranks call.

A blocking one goes straight to the transport while nothing else is open on this rank; else it is a started one that is
waited for, so that what is open moves on meanwhile.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.collectives import device_works
from dtrain.collectives.counters import Volume
from dtrain.collectives.device import on_gpu
from dtrain.collectives.dtypes import Array
from dtrain.collectives.forms import check_pair, deliver, destination, flat, target_of
from dtrain.collectives.shortcuts import Shortcuts
from dtrain.collectives.work import Request, Watched, Work


class Messages(Shortcuts):
    """A group whose ranks send to one another."""

    def send(self, array: Any, destination: int, tag: int = 0) -> None:
        """Send array to rank destination; returns when array may be changed again."""
        if self._progress.busy() or (type(array) is not np.ndarray and on_gpu(array)):
            self.send_async(array, destination, tag).wait()
            return
        check_pair("destination", destination, tag, self.rank, self.size)
        source = flat(np.asarray(array))
        self.transport.send(source, destination, tag)
        self.counters.add("send", "message", source.nbytes, Volume(1, source.nbytes, 0))

    def recv(self, out: Array, source: int, tag: int = 0) -> Array:
        """Receive into out, which has the shape and dtype of what rank source sends."""
        if self._progress.crowded or self._progress.busy() or (type(out) is not np.ndarray and on_gpu(out)):
            return self.recv_async(out, source, tag).wait()
        check_pair("source", source, tag, self.rank, self.size)
        target = target_of(destination(out, out.shape, out.dtype))
        self.transport.recv(target, source, tag)
        self.counters.add("recv", "message", target.nbytes, Volume(1, 0, target.nbytes))
        return deliver(target, out)

    def sendrecv(self, array: Any, destination: int, out: Array, source: int, tag: int = 0) -> Array:
        """Send array to one rank while receiving out from another."""
        sending = self.send_async(array, destination, tag)
        self.recv(out, source, tag)
        sending.wait()
        return out

    def send_async(self, array: Any, destination: int, tag: int = 0) -> Work:
        """`send`, started: array is left alone until `wait`."""
        check_pair("destination", destination, tag, self.rank, self.size)
        if type(array) is not np.ndarray and on_gpu(array):
            return device_works.send_async(self, array, destination, tag)
        array = np.asarray(array)
        source = flat(array)
        self.counters.add("send", "message", source.nbytes, Volume(1, source.nbytes, 0))
        return self._watch(
            self.transport.start_send(source, destination, tag), lambda: array, "send to", destination, "tag", tag
        )

    def recv_async(self, out: Array, source: int, tag: int = 0) -> Work:
        """`recv`, started: out is left alone until `wait`."""
        check_pair("source", source, tag, self.rank, self.size)
        if type(out) is not np.ndarray and on_gpu(out):
            return device_works.recv_async(self, out, source, tag)
        target = target_of(destination(out, out.shape, out.dtype))
        self.counters.add("recv", "message", target.nbytes, Volume(1, 0, target.nbytes))
        return self._watch(
            self.transport.start_recv(target, source, tag),
            lambda: deliver(target, out),
            "recv from",
            source,
            "tag",
            tag,
        )

    def _watch(self, request: Request, finish: Callable[[], Array], *what: object) -> Work:
        """The work of a request of the transport; it is helped along in every wait."""
        self._progress.watch(request)
        self._progress.wake()
        return Work(Watched(request, self._progress), finish, what)
