"""What collectives over several nodes must do, whatever carries them: for threads, processes and hosts.

Every rank knows the inputs of all; the expected sums come from plain NumPy, in the order of the nodes.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dtrain.collectives import Communicator, hierarchy_volumes, wait_all
from dtrain.collectives.algorithms import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, BROADCAST, REDUCE_SCATTER
from dtrain.collectives.call import Call
from dtrain.collectives.levels import Levels
from tests.oracle import DTYPES, OPS, bits, inputs, join, same_everywhere

Array = np.ndarray[Any, Any]
HOW = "hierarchical"


def levels_of(comm: Communicator) -> Levels:
    levels = comm.levels
    assert levels is not None
    return levels


def total(comm: Communicator, arrays: list[Array], op: str = "sum") -> Array:
    """The sum over each node in rank order, then over the nodes; small floats in float32, rounded once."""
    dtype = arrays[0].dtype.newbyteorder("=")
    wide = np.dtype(np.float32) if dtype in (np.float16, np.dtype(ml_dtypes.bfloat16)) else dtype
    sums = []
    for ranks in levels_of(comm).nodes:
        part = arrays[ranks[0]].astype(wide)
        for rank in ranks[1:]:
            part = OPS[op](part, arrays[rank].astype(wide))
        sums.append(part)
    result = sums[0]
    for part in sums[1:]:
        result = OPS[op](result, part)
    return np.asarray(result.astype(arrays[0].dtype))


def homes(comm: Communicator, values: Array) -> list[Array]:
    """The values in ordinary memory, and where the peers see them."""
    if not values.dtype.isnative:
        return [values.copy()]
    window = comm.empty(values.shape, values.dtype)
    window[...] = values
    return [values.copy(), window]


def lengths(comm: Communicator, dtype: np.dtype[Any], longest: int = 600_011) -> list[int]:
    """Around the number of ranks, and several pieces and portions of float32."""
    long = [70_001, longest] if dtype == np.float32 else [5001]
    return sorted({1, comm.size - 1, comm.size + 1, *long})


def groups(comm: Communicator) -> None:
    """The levels are those of the nodes; every rank drives something."""
    levels, nodes = levels_of(comm), comm.transport.nodes
    assert comm.node is None and comm.levels is levels
    assert sorted(rank for ranks in levels.nodes for rank in ranks) == list(range(comm.size))
    assert all(len({nodes[rank] for rank in ranks}) == 1 for ranks in levels.nodes)
    assert comm.rank in levels.nodes[levels.here]
    assert levels.inner.size == len(levels.members) and levels.inner.rank == comm.local_rank
    assert levels.lane.size == sum(comm.local_rank < len(ranks) for ranks in levels.nodes)
    everyone = comm.all_gather_object(list(levels.mine))
    for ranks in levels.nodes:
        assert sorted(lane for rank in ranks for lane in everyone[rank]) == list(range(levels.lanes))
    # Two levels by hand, as the course teaches it: the sum over the lane of the sums over the node.
    if levels.lane.size == len(levels.nodes) and comm.size == len(levels.nodes) * levels.lanes:
        found = levels.lane.all_reduce(levels.inner.all_reduce(np.array([comm.rank])))
        assert found[0] == sum(range(comm.size))


def all_reduce(comm: Communicator) -> None:
    for dtype in DTYPES:
        for count in lengths(comm, dtype):
            arrays = inputs(comm.size, count, dtype)
            mine, expected = arrays[comm.rank], total(comm, arrays)
            for source in homes(comm, mine):
                result = comm.all_reduce(source, algorithm=HOW)
                assert bits(result) == bits(expected), f"{dtype}, {count} elements"
                assert bits(source) == bits(mine), "the input was changed"
                assert comm.all_reduce(source, out=source, algorithm=HOW) is source
                assert bits(source) == bits(expected), f"{dtype}, {count} elements, in place"
                source[...] = mine
                assert bits(comm.all_reduce_async(source, out=source).wait()) == bits(source)
    for op in OPS:
        arrays = inputs(comm.size, 3001, np.dtype("float64"))
        assert bits(comm.all_reduce(arrays[comm.rank], op, algorithm=HOW)) == bits(total(comm, arrays, op))
    wide = np.arange(6000.0).reshape(60, 100)[:, ::2]
    assert np.array_equal(comm.all_reduce(wide, algorithm=HOW), wide * comm.size)
    result = comm.all_reduce(inputs(comm.size, 70_001, np.dtype("float32"))[comm.rank])
    assert comm.last is not None and comm.last.algorithm == HOW, "auto"
    same_everywhere(comm, result)
    again = comm.all_reduce(inputs(comm.size, 70_001, np.dtype("float32"))[comm.rank])
    assert bits(again) == bits(result)
    assert comm.all_reduce(np.empty(0), algorithm=HOW).shape == (0,)
    shared = comm.all_reduce_shared(np.ones(70_001, np.float32))
    assert np.all(shared == comm.size) and not shared.flags.writeable


def reduce_scatter(comm: Communicator) -> None:
    uneven = [(rank * 7 + 3) % 5 * 1000 for rank in range(comm.size)]
    for dtype in DTYPES:
        for count in lengths(comm, dtype):
            arrays = inputs(comm.size, count, dtype)
            mine, expected = arrays[comm.rank], np.array_split(total(comm, arrays), comm.size)
            for source in homes(comm, mine):
                result = comm.reduce_scatter(source, algorithm=HOW)
                assert bits(result) == bits(expected[comm.rank]), f"{dtype}, {count} elements"
                assert bits(comm.reduce_scatter_async(source).wait()) == bits(result) or count < 300_000
                assert bits(source) == bits(mine), "the input was changed"
    arrays = inputs(comm.size, sum(uneven), np.dtype("int64"))
    start = sum(uneven[: comm.rank])
    expected = total(comm, arrays)[start : start + uneven[comm.rank]]
    for source in homes(comm, arrays[comm.rank]):
        assert bits(comm.reduce_scatter(source, counts=uneven, algorithm=HOW)) == bits(expected)
        own = source[start : start + uneven[comm.rank]]
        assert comm.reduce_scatter(source, counts=uneven, out=own, algorithm=HOW) is own
        assert bits(own) == bits(expected), "into my own block"


def movement(comm: Communicator) -> None:
    for dtype in [*DTYPES, np.dtype([("a", "i2"), ("b", "f8")])]:
        plain = dtype if dtype.names is None else np.dtype("float64")
        for count in [*lengths(comm, dtype, 100_003), comm.size * 1000]:
            arrays = [array.astype(dtype) for array in inputs(comm.size, count, plain)]
            blocks = [np.array_split(array, comm.size) for array in arrays]
            for source in homes(comm, arrays[comm.rank]):
                assert bits(comm.all_gather(source, algorithm=HOW)) == bits(join(arrays)), f"{dtype} {count}"
                assert bits(comm.all_gather_async(source).wait()) == bits(join(arrays))
                assert bits(source) == bits(arrays[comm.rank])
                for root in {0, count % comm.size, comm.size - 1}:
                    assert bits(comm.broadcast(source, root, algorithm=HOW)) == bits(arrays[root]), f"{dtype} {count}"
                    assert bits(comm.broadcast_async(source, root).wait()) == bits(arrays[root])
                if count % comm.size == 0:
                    received = comm.all_to_all(source, algorithm=HOW)
                    assert bits(received) == bits(join([row[comm.rank] for row in blocks]))
    counts = [(rank * 5 + 2) % 4 * 700 for rank in range(comm.size)]
    rows = [np.full((count, 3), rank) for rank, count in enumerate(counts)]
    assert np.array_equal(comm.all_gather(rows[comm.rank], counts=counts, algorithm=HOW), np.concatenate(rows))
    whole = comm.empty((comm.size * 9000,), np.int32)
    own = whole[comm.rank * 9000 : (comm.rank + 1) * 9000]
    own[...] = comm.rank
    assert comm.all_gather(own, out=whole, algorithm=HOW) is whole
    assert np.array_equal(whole, np.repeat(np.arange(comm.size), 9000)), "in place"
    long = np.repeat(np.arange(comm.size), 60_000) + 100 * comm.rank
    expected = np.repeat(np.arange(comm.size) * 100, 60_000) + comm.rank
    assert np.array_equal(comm.all_to_all(long, algorithm=HOW), expected)
    assert np.array_equal(comm.all_to_all(long, out=long), expected), "in place"
    # What both levels do not do still works beside them, with arrays of the window too.
    for source in homes(comm, np.full(50_000, comm.rank, np.float32)):
        assert np.array_equal(comm.all_gather(source), np.repeat(np.arange(comm.size), 50_000))
        reduced, gathered = comm.reduce(source, root=1), comm.gather(source, root=1)
        if comm.rank == 1:
            assert reduced is not None and np.all(reduced == sum(range(comm.size)))
            assert gathered is not None and np.array_equal(gathered, np.repeat(np.arange(comm.size), 50_000))
        block = comm.scatter(np.repeat(np.arange(comm.size), 4000) if comm.rank == 0 else None)
        assert np.all(block == comm.rank)


def in_flight(comm: Communicator) -> None:
    """Many at once, in the window and not, waited for in another order on every rank, with others in between."""
    other = comm.split(0)
    assert other is not None
    for started in range(3):
        buffers = [comm.empty(count) for count in (50_000, 400_000, 17_000, 90_000)]
        buffers += [np.empty(count, np.float32) for count in (300_000, 20_000, 300_001, 20_001)]
        for number, buffer in enumerate(buffers):
            buffer[...] = comm.rank + number + started
        works = [comm.all_reduce_async(buffer, out=buffer) for buffer in buffers]
        works += [other.all_reduce_async(np.full(60_000, 2.0))]
        gathered = comm.all_gather_async(np.full(40_000, comm.rank))
        if started == 1:
            comm.barrier()
            assert comm.all_reduce(np.ones(3))[0] == comm.size
        if started == 2:
            assert comm.all_reduce(np.ones(200_000, np.float32))[-1] == comm.size
        for number in np.random.default_rng(comm.rank).permutation(len(works)):
            works[number].wait()
        base = sum(range(comm.size))
        for number, buffer in enumerate(buffers):
            assert np.all(buffer == base + (number + started) * comm.size), f"buffer {number}"
        assert np.all(wait_all(works)[-1] == 2 * comm.size)
        assert np.array_equal(gathered.wait(), np.repeat(np.arange(comm.size), 40_000))
        assert gathered.done()
    other.close()


def volumes(comm: Communicator) -> None:
    """What was sent to other nodes is what the formulas say; two nodes send n each, whatever the number of ranks."""
    levels, before = levels_of(comm), 0
    for dtype in (np.dtype("float32"), np.dtype("float16")):
        for count in (comm.size * 3, comm.size * 50_000):
            for source in homes(comm, np.ones(count, dtype)):
                place = comm._sum_place(source)
                block = [count // comm.size] * comm.size
                many = np.empty(count * comm.size, dtype)
                base: dict[str, Any] = {"levels": lambda: levels}
                cases: list[tuple[str, Callable[[], Any], Call, Any, Any]] = [
                    (
                        "all_reduce",
                        lambda source=source: comm.all_reduce(source, out=source, algorithm=HOW),
                        Call(comm.transport, None, source, source, place=place, in_place=True, **base),
                        hierarchy_volumes.all_reduce_network,
                        ALL_REDUCE,
                    ),
                    (
                        "reduce_scatter",
                        lambda source=source: comm.reduce_scatter(source, algorithm=HOW),
                        Call(comm.transport, None, source, source[: block[0]], counts=block, place=place, **base),
                        hierarchy_volumes.reduce_scatter_network,
                        REDUCE_SCATTER,
                    ),
                    (
                        "all_gather",
                        lambda source=source: comm.all_gather(source, algorithm=HOW),
                        Call(comm.transport, None, source, many, counts=[count] * comm.size, **base),
                        hierarchy_volumes.all_gather_network,
                        ALL_GATHER,
                    ),
                    (
                        "broadcast",
                        lambda source=source: comm.broadcast(source, root=1, algorithm=HOW),
                        Call(comm.transport, None, source, source, root=1, **base),
                        hierarchy_volumes.broadcast_network,
                        BROADCAST,
                    ),
                    (
                        "all_to_all",
                        lambda source=source: comm.all_to_all(source, algorithm=HOW),
                        Call(comm.transport, None, source, source, counts=block, **base),
                        hierarchy_volumes.all_to_all_network,
                        ALL_TO_ALL,
                    ),
                ]
                for name, run, call, formula, table in cases:
                    before = levels.sent
                    comm.counters.reset()
                    run()
                    sent = levels.sent - before
                    assert sent == formula(call), f"{name} of {count} {dtype}"
                    assert comm.counters.volume(name, HOW) == table[HOW].volume(call)
                    assert comm.counters.volume(name, HOW).sent >= sent
                    if name == "all_reduce" and len(levels.nodes) == 2 and dtype == np.float32:
                        totals = comm.all_gather(np.array([sent]))
                        assert all(sum(totals[rank] for rank in ranks) == source.nbytes for ranks in levels.nodes)


ALL: dict[str, Callable[[Communicator], None]] = {
    "groups": groups,
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "movement": movement,
    "in_flight": in_flight,
    "volumes": volumes,
}
