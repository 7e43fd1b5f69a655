"""Compression of gradients: codecs, lossless cases against the exact sum, what is kept back, bytes, several nodes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dtrain.arrays import named_dtype
from dtrain.collectives import Communicator, run_threads
from dtrain.flat import FlatBuffers
from dtrain.flat_group import FlatGroup
from dtrain.mesh import Mesh
from dtrain.modules import Linear, Module
from dtrain.strategies.compression import COMPRESSIONS, BetweenNodes, Compression
from dtrain.strategies.compression.casting import Casting
from dtrain.strategies.compression.power_sgd import PowerSGD
from dtrain.strategies.compression.quantised import Quantised
from dtrain.strategies.compression.top_k import TopK
from dtrain.strategies.ddp import make_buckets

# Ranks by node: even, uneven, mixed up, and a node per rank.
NODES = [[0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1, 2, 0], [0, 1, 2], [0, 0, 0, 0, 1, 1, 1, 1, 2]]

KINDS: dict[str, Callable[[], Compression]] = {
    "float16": lambda: Casting("float16"),
    "bfloat16": lambda: Casting("bfloat16"),
    "int8": lambda: Quantised(16),
    "int8 nearest": lambda: Quantised(16, stochastic=False),
    "top_k": lambda: TopK(0.1),
    "power_sgd": lambda: PowerSGD(2),
}


class Layers(Module):
    """A few matrices and vectors of uneven lengths."""

    def __init__(self, dtype: Any) -> None:
        self.layers = [Linear(rows, columns, dtype=dtype) for rows, columns in ((7, 12), (12, 9), (9, 1), (1, 5))]
        self.assign_names()


class Rig:
    """The flat gradients of one rank in a cluster that is pretended, and the compressor that sums them."""

    def __init__(
        self,
        comm: Communicator,
        nodes: list[int],
        compression: Compression,
        dtype: Any = np.float64,
        bucket_bytes: int = 500,
        everywhere: bool = False,
    ) -> None:
        comm.transport.nodes = nodes
        self.comm = comm
        self.between = BetweenNodes(compression, everywhere)
        home = self.between.open(comm, Mesh(comm, dp=-1))
        assert home is not None
        self.flat = FlatBuffers(
            Layers(named_dtype(dtype) if isinstance(dtype, str) else dtype).named_parameters(), home
        )
        self.buckets = [(bucket.group, bucket.where) for bucket in make_buckets(self.flat, bucket_bytes)]
        self.between.attach(self.buckets)

    @property
    def group(self) -> FlatGroup:
        return self.flat.groups[0]

    def sum(self, gradient: Any) -> Any:
        """One step: what comes out for this rank's flat gradient."""
        self.group.grad[...] = gradient
        for number in range(len(self.buckets)):
            self.between.start(number)
        self.between.finish()
        return self.group.grad.copy()


def gradients(group: FlatGroup, size: int, steps: int, whole: bool = False) -> Any:
    """Flat gradients (steps, size, n), 0 between the parameters; `whole`: small whole numbers, whose sums are exact."""
    generator = np.random.default_rng(7)
    drawn = generator.normal(size=(steps, size, group.size)) * np.exp(generator.normal(size=group.size))
    if whole:
        drawn = np.rint(np.clip(drawn, -6, 6))
        drawn[..., ::16] = 127 // size  # int8: the largest of a block; then its scale is a whole number's
    inside = np.zeros(group.size, bool)
    for where in group.slices.values():
        inside[where] = True
    return drawn * inside


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_all_ranks_get_the_same_bits_near_the_sum_and_again(kind: str, nodes: list[int]) -> None:
    def work(comm: Communicator) -> tuple[Any, Any]:
        rig = Rig(comm, nodes, KINDS[kind]())
        given = gradients(rig.group, comm.size, 3)
        return np.array([rig.sum(each[comm.rank]) for each in given]), given.sum(1)

    results = run_threads(len(nodes), work)
    again = run_threads(len(nodes), work)
    for (result, _), (repeated, _) in zip(results, again, strict=True):
        np.testing.assert_array_equal(result, results[0][0])
        np.testing.assert_array_equal(result, repeated)
    result, exact = results[0]
    error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
    assert 0 < error < {"float16": 1e-3, "bfloat16": 6e-3, "int8": 0.03, "int8 nearest": 0.02}.get(kind, 0.95)


LOSSLESS: dict[str, tuple[Callable[[], Compression], bool]] = {
    "top_k of everything": (lambda: TopK(1.0), False),
    "float16 of whole numbers": (lambda: Casting("float16"), True),
    "bfloat16 of whole numbers": (lambda: Casting("bfloat16"), True),
    "power_sgd where all matrices are too thin": (lambda: PowerSGD(100), False),
}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_what_loses_nothing_is_the_sum(kind: str, nodes: list[int], dtype: str) -> None:
    make, whole = LOSSLESS[kind]

    def work(comm: Communicator) -> None:
        rig = Rig(comm, nodes, make(), dtype)
        for given in gradients(rig.group, comm.size, 2, whole or dtype == "bfloat16"):
            exact = given.sum(0).astype(rig.group.dtype)
            result = rig.sum(given[comm.rank])
            if whole or dtype == "bfloat16":
                np.testing.assert_array_equal(result, exact)
            else:  # another order of adding up
                np.testing.assert_allclose(result, exact, rtol=0, atol=1e-14 if dtype == "float64" else 1e-5)

    run_threads(len(nodes), work)


@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_power_sgd_is_exact_for_matrices_of_its_rank(nodes: list[int]) -> None:
    """Two columns suffice for the sum of matrices that all lie in the same two directions."""

    def work(comm: Communicator) -> None:
        rig = Rig(comm, nodes, PowerSGD(2))
        generator = np.random.default_rng(3)
        gradient = np.zeros((comm.size, rig.group.size))
        for name, where in rig.group.slices.items():
            shape = rig.group.shapes[name]
            if len(shape) == 2:
                left = generator.normal(size=(shape[0], min(2, *shape)))
                each = [left @ generator.normal(size=(left.shape[1], shape[1])) for _ in range(comm.size)]
                gradient[:, where] = np.reshape(each, (comm.size, -1))
            else:
                gradient[:, where] = generator.normal(size=(comm.size, where.stop - where.start))
        np.testing.assert_allclose(rig.sum(gradient[comm.rank]), gradient.sum(0), rtol=1e-11, atol=1e-12)
        for part in rig.between.parts:
            assert part.residual is not None
            np.testing.assert_allclose(part.residual, 0, atol=1e-12)

    run_threads(len(nodes), work)


@pytest.mark.parametrize("kind", ["top_k", "power_sgd"])
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_what_was_sent_and_what_is_kept_is_all_there_was(kind: str, nodes: list[int]) -> None:
    whole = kind == "top_k"  # it moves numbers and does not compute: whole ones stay exact

    def work(comm: Communicator) -> tuple[Any, Any]:
        rig = Rig(comm, nodes, KINDS[kind]())
        given = gradients(rig.group, comm.size, 6, whole)
        sent = sum(rig.sum(each[comm.rank]) for each in given)
        kept = np.zeros(rig.group.size)
        for (group, bucket), part in zip(rig.buckets, rig.between.parts, strict=True):
            assert part.residual is not None
            start = part.gradient.__array_interface__["data"][0] - group.grad.__array_interface__["data"][0]
            start //= group.grad.itemsize
            assert not len(part.residual) or bucket.start <= start < bucket.stop
            kept[start : start + len(part.residual)] += part.residual
        return sent + comm.all_reduce(kept), given.sum((0, 1))

    for result, exact in run_threads(len(nodes), work):
        if whole:
            np.testing.assert_array_equal(result, exact)
        else:
            np.testing.assert_allclose(result, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_bytes_between_nodes_are_those_of_the_formula(kind: str, nodes: list[int], dtype: str) -> None:
    def work(comm: Communicator) -> tuple[int, int, int, int]:
        rig = Rig(comm, nodes, KINDS[kind](), dtype)
        given = gradients(rig.group, comm.size, 1)[0]
        rig.between.lane.counters.reset()
        rig.sum(given[comm.rank])
        sent = rig.between.lane.counters.volume().sent
        return rig.between.node, sent, rig.between.sent(), rig.between.uncompressed()

    rows = run_threads(len(nodes), work)
    # A formula is the mean over the ranks of a lane, in whole bytes: a few for each part and message.
    assert sum(row[1] for row in rows) == pytest.approx(sum(row[2] for row in rows), abs=4 * len(nodes) * 12)
    assert 0 < sum(row[1] for row in rows) < sum(row[3] for row in rows)


def test_top_k_sends_exactly_its_formula() -> None:
    def work(comm: Communicator) -> None:
        rig = Rig(comm, [0, 0, 1, 1], TopK(0.1), np.float32)
        rig.between.lane.counters.reset()
        rig.sum(1.0)
        expected = sum(8 * max(1, math.ceil(0.1 * part.gradient.size)) for part in rig.between.parts)
        assert rig.between.lane.counters.volume().sent == rig.between.sent() == expected

    run_threads(4, work)


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_gradients_stay_visible(kind: str) -> None:
    def work(comm: Communicator) -> Any:
        rig = Rig(comm, [0, 0, 1, 1], KINDS[kind]())
        given = gradients(rig.group, comm.size, 1)[0, comm.rank]
        if comm.rank == 2:
            given[rig.group.slices["layers.1.weight"].start] = np.nan
        return rig.sum(given)

    assert all(not np.isfinite(result).all() for result in run_threads(4, work))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_zero_give_zero_and_do_not_stick(kind: str) -> None:
    def work(comm: Communicator) -> None:
        rig = Rig(comm, [0, 0, 1, 1], KINDS[kind]())
        given = gradients(rig.group, comm.size, 1)[0]
        np.testing.assert_array_equal(rig.sum(0.0), 0)
        for _ in range(30):
            last = rig.sum(given[comm.rank])
        assert np.linalg.norm(last) > 0.3 * np.linalg.norm(given.sum(0))

    run_threads(4, work)


def test_one_node_has_nothing_to_compress_unless_every_rank_counts_as_one() -> None:
    def work(comm: Communicator) -> None:
        alone = BetweenNodes(TopK(0.1))
        assert alone.open(comm, Mesh(comm, dp=-1)) is None
        assert "one node" in alone.notes()[0] and "everywhere" in alone.notes()[0]
        rig = Rig(comm, [0, 0, 0], TopK(1.0), everywhere=True)
        given = gradients(rig.group, comm.size, 1)[0]
        np.testing.assert_allclose(rig.sum(given[comm.rank]), given.sum(0), rtol=1e-14)
        assert "between 3 ranks" in rig.between.notes()[0]

    run_threads(3, work)


def test_every_kind_of_the_configuration_is_in_the_table() -> None:
    from typing import get_args

    from dtrain.config import CompressionConfig

    kinds = {str(member.__struct_config__.tag): member() for member in get_args(CompressionConfig)}
    assert set(kinds) == {"none", *COMPRESSIONS}
    for kind, options in kinds.items():
        if kind != "none":
            assert COMPRESSIONS[kind](options).name == kind


# --- codecs -----------------------------------------------------------------------------------------------------------


def there_and_back(codec: Any, values: Any, key: tuple[int, ...] = (0,)) -> Any:
    payload = codec.encode(values.copy(), key)
    assert payload.dtype == np.uint8 and payload.shape == (codec.nbytes(values.size),)
    result = np.empty_like(values)
    codec.decode(payload, result)
    return result


@pytest.mark.parametrize("count", [0, 1, 5, 16, 17, 1000])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_codecs_err_no_more_than_they_may(count: int, scale: float, dtype: Any) -> None:
    values = (np.random.default_rng(count).normal(size=count) * scale).astype(dtype)
    largest = np.abs(values).max(initial=0)
    np.testing.assert_allclose(there_and_back(Casting("bfloat16"), values), values, rtol=2**-8)
    np.testing.assert_allclose(there_and_back(Casting("float16"), values), values, rtol=2**-11, atol=largest * 2**-38)
    for stochastic, quanta in ((False, 0.5001), (True, 1.0001)):
        decoded = there_and_back(Quantised(16, stochastic), values)
        for start in range(0, count, 16):
            block = slice(start, start + 16)
            allowed = quanta * np.abs(values[block]).max() / 127
            assert np.abs(decoded[block] - values[block]).max() <= allowed


def test_bytes_of_nearest_rounding_are_those_written_out() -> None:
    payload = Quantised(4, stochastic=False).encode(np.array([127.0, -63.4, 0.5, 1.5, -254.0]), (0,))
    np.testing.assert_array_equal(payload[:8].view(np.float32), [1.0, 2.0])
    np.testing.assert_array_equal(payload[8:].view(np.int8), [127, -63, 0, 2, -127])


def test_stochastic_rounding_is_right_on_average_and_the_same_again() -> None:
    values = np.concatenate(
        [np.full(20000, x, np.float32) for x in (0.3, -0.3, 1.0, 12.75)] + [np.array([127.0], np.float32)]
    )
    codec = Quantised(len(values))
    result = there_and_back(codec, values, (3, 1))
    np.testing.assert_array_equal(result, there_and_back(codec, values, (3, 1)))
    assert (result != there_and_back(codec, values, (4, 1))).any()
    for start, x in zip(range(0, 80000, 20000), (0.3, -0.3, 1.0, 12.75), strict=True):
        drawn = result[start : start + 20000]
        spread = math.sqrt((x - math.floor(x)) * (1 - (x - math.floor(x))) / 20000)
        assert abs(drawn.mean() - x) <= 4 * spread + 2**-16
        assert set(np.unique(drawn)) <= {math.floor(x), math.ceil(x)}
