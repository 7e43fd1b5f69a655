"""Collectives on the tape: each op's backward is its conjugate collective.

    copy             x ──────────► x          ◄──── all_reduce        Megatron's f: a replicated x is used in parts
    all_reduce       x ──► Σ x                ◄──── copy              Megatron's g: partial results become the whole
    all_gather       blocks ──► whole         ◄──── reduce_scatter    the whole is used in parts (sequence parallelism)
    reduce_scatter   whole ──► my block of Σ  ◄──── all_gather
    gather           blocks ──► whole         ◄──── split             the whole is used alike by all
    split            whole ──► my block       ◄──── gather
    all_to_all       cut here, whole there    ◄──── the way back
    broadcast        root's x ──► all         ◄──── reduce            reduce(x): Σ x at root, 0 elsewhere
    send, recv       x ──► another rank's     ◄──── gradient comes back

Between hosts the sums of the backwards of `copy` and `all_gather` are started, and the walk computes the gradients of
the weights behind them before it waits (`Op.start`).

Blocks are along a `dim`, cut as everywhere: the first ranks get one more. `length` is that of the whole dim; where it
is not given although other ranks have the blocks, the ranks ask one another, which costs a small collective.

Invariant: all ranks of `comm` apply the same ops in the same order, and so does the walk back; with one rank every op
is the identity. All are linear: forward mode applies them to the tangents.
Reference: Shoeybi et al., Megatron-LM, arXiv:1909.08053, figure 3; Korthikanti et al., arXiv:2205.05198, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.array_blocks import block, exchanged, gathered, reduce_scattered, start_reduce_scattered
from dtrain.arrays import Array
from dtrain.collectives import Communicator
from dtrain.collectives.dtypes import cut
from dtrain.op import ITSELF, Op, Shape
from dtrain.tensor import Tensor, apply

# The table of ops: forward, and the conjugate as its vjp. `a` are the attributes.


def _op(name: str, forward: Any, backward: Any, start: Any = None) -> Op:
    return Op(
        name,
        lambda x, **a: (forward(x, **a), None),
        lambda node, g: (backward(g, **node.attributes),),
        ITSELF,
        lambda inputs, output, attributes: 0,
        start=start and (lambda node, g: _tuple(start(g, **node.attributes))),
    )


def _tuple(finish: Callable[[], Array]) -> Callable[[], tuple[Array]]:
    return lambda: (finish(),)


def _same(x: Array, **_: Any) -> Array:
    return x


def _sum(x: Array, comm: Communicator) -> Array:
    return comm.all_reduce(x)


def _gather(x: Array, comm: Communicator, dim: int, lengths: Sequence[int]) -> Array:
    return gathered(x, comm, dim, lengths)


def _scatter(x: Array, comm: Communicator, dim: int, lengths: Sequence[int]) -> Array:
    return reduce_scattered(x, comm, dim, lengths)


def _split(x: Array, comm: Communicator, dim: int, lengths: Sequence[int]) -> Array:
    return np.ascontiguousarray(block(x, dim, lengths, comm.rank))


def _there(x: Array, comm: Communicator, dims: tuple[int, int], lengths: tuple[Sequence[int], Sequence[int]]) -> Array:
    return exchanged(x, comm, *dims, *lengths)


def _back(x: Array, comm: Communicator, dims: tuple[int, int], lengths: tuple[Sequence[int], Sequence[int]]) -> Array:
    return exchanged(x, comm, *dims[::-1], *lengths[::-1])


def _broadcast(x: Array, comm: Communicator, root: int) -> Array:
    return comm.broadcast(x, root)


def _reduce(x: Array, comm: Communicator, root: int) -> Array:
    total = comm.reduce(x, root=root)
    return np.zeros_like(x) if total is None else total


def _start_sum(x: Array, comm: Communicator) -> Callable[[], Array]:
    return comm.all_reduce_async(x).wait


COPY = _op("copy_to_parts", _same, _sum)
COPY_FAR = _op("copy_to_parts", _same, _sum, _start_sum)
ALL_REDUCE = _op("all_reduce", _sum, _same)
ALL_GATHER = _op("all_gather", _gather, _scatter)
ALL_GATHER_FAR = _op("all_gather", _gather, _scatter, start_reduce_scattered)
REDUCE_SCATTER = _op("reduce_scatter", _scatter, _gather)
GATHER = _op("gather_blocks", _gather, _split)
SPLIT = _op("split_blocks", _split, _gather)
ALL_TO_ALL = _op("all_to_all", _there, _back)
BROADCAST = _op("broadcast", _broadcast, _reduce)
REDUCE = _op("reduce", _reduce, _broadcast)


def far(comm: Communicator) -> bool:
    """Whether a sum over these ranks is started in the backward and moves while they compute: between hosts. On one
    host the cores that compute also move, and it was slower (docs/tensor.md)."""
    return len(set(comm.hosts)) > 1


def copy(x: Tensor, comm: Communicator) -> Tensor:
    """X itself, on all ranks the same; each uses it for a part of the result, so the gradients are summed."""
    return x if comm.size == 1 else apply(COPY_FAR if far(comm) else COPY, x, comm=comm)


def all_reduce(x: Tensor, comm: Communicator) -> Tensor:
    """The sum of all ranks' x; all go on with it alike, so each has the whole gradient."""
    return x if comm.size == 1 else apply(ALL_REDUCE, x, comm=comm)


def all_gather(x: Tensor, comm: Communicator, dim: int, length: int | None = None) -> Tensor:
    """The blocks of all ranks along dim; each uses the whole for a part of the result."""
    if comm.size == 1:
        return x
    op = ALL_GATHER_FAR if far(comm) else ALL_GATHER
    return apply(op, x, comm=comm, dim=_dim(x, dim), lengths=_lengths(x, comm, dim, length))


def reduce_scatter(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    """My block along dim of the sum of all ranks' x."""
    if comm.size == 1:
        return x
    return apply(REDUCE_SCATTER, x, comm=comm, dim=_dim(x, dim), lengths=cut(x.shape[dim], comm.size))


def gather(x: Tensor, comm: Communicator, dim: int, length: int | None = None) -> Tensor:
    """The blocks of all ranks along dim; all go on with the whole alike."""
    if comm.size == 1:
        return x
    return apply(GATHER, x, comm=comm, dim=_dim(x, dim), lengths=_lengths(x, comm, dim, length))


def split(x: Tensor, comm: Communicator, dim: int) -> Tensor:
    """My block along dim of an x that all ranks have."""
    if comm.size == 1:
        return x
    return apply(SPLIT, x, comm=comm, dim=_dim(x, dim), lengths=cut(x.shape[dim], comm.size))


def all_to_all(x: Tensor, comm: Communicator, split_dim: int, concat_dim: int, length: int | None = None) -> Tensor:
    """From blocks along concat_dim (whole: `length`) to blocks along split_dim."""
    if comm.size == 1:
        return x
    dims = _dim(x, split_dim), _dim(x, concat_dim)
    if dims[0] == dims[1]:
        raise ValueError(f"all_to_all: split_dim and concat_dim are both {split_dim}; they must differ")
    lengths = cut(x.shape[split_dim], comm.size), _lengths(x, comm, concat_dim, length)
    return apply(ALL_TO_ALL, x, comm=comm, dims=dims, lengths=lengths)


def broadcast(x: Tensor, comm: Communicator, root: int = 0) -> Tensor:
    """The x of rank root on all; each uses it for a part of the result."""
    return x if comm.size == 1 else apply(BROADCAST, x, comm=comm, root=root)


def reduce(x: Tensor, comm: Communicator, root: int = 0) -> Tensor:
    """The sum of all ranks' x on rank root, 0 elsewhere; only root may go on with it."""
    return x if comm.size == 1 else apply(REDUCE, x, comm=comm, root=root)


# Between two ranks. The tape has no edge from one process to another: each end is an op of its own.


def _sent(x: Array, comm: Communicator, peer: int, tag: int) -> tuple[Array, Any]:
    comm.send(x, peer, tag)
    return np.zeros((), x.dtype), None


def _sent_vjp(node: Any, g: Array) -> tuple[Array]:
    a = node.attributes
    return (a["comm"].recv(np.empty(node.shapes[0], node.dtype), a["peer"], a["tag"]),)


def _received(anchor: Array, comm: Communicator, shape: Shape, peer: int, tag: int) -> tuple[Array, Any]:
    return comm.recv(np.empty(shape, anchor.dtype), peer, tag), None


def _received_vjp(node: Any, g: Array) -> tuple[Array]:
    a = node.attributes
    a["comm"].send(np.ascontiguousarray(g), a["peer"], a["tag"])
    return (np.zeros((), g.dtype),)


SEND = Op("send", _sent, _sent_vjp, flops=lambda inputs, output, attributes: 0)
RECV = Op("recv", _received, _received_vjp, flops=lambda inputs, output, attributes: 0)


def send(x: Tensor, comm: Communicator, destination: int, tag: int = 0) -> Tensor:
    """Send x; returns a 0 whose backward waits for the gradient of x from there."""
    return apply(SEND, x, comm=comm, peer=destination, tag=tag)


def recv(shape: Shape, dtype: Any, comm: Communicator, source: int, tag: int = 0) -> Tensor:
    """What rank source sends; its gradient is sent back in the backward."""
    anchor = Tensor(np.zeros((), dtype), requires_grad=True)  # so that there is a leaf to walk to
    return apply(RECV, anchor, comm=comm, shape=tuple(shape), peer=source, tag=tag)


def _dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim} of a tensor of shape {x.shape}")
    return dim % x.ndim


def _lengths(x: Tensor, comm: Communicator, dim: int, length: int | None) -> list[int]:
    """The lengths of all ranks' blocks, this rank's checked."""
    if length is None:
        return [int(each) for each in comm.all_gather(np.array([x.shape[dim]]))]
    lengths = cut(length, comm.size)
    if lengths[comm.rank] != x.shape[dim]:
        raise ValueError(
            f"length={length}: rank {comm.rank} of {comm.size} has {lengths[comm.rank]} of it, not {x.shape[dim]}"
        )
    return lengths
