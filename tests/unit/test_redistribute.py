"""All pairs of layouts on meshes of one and two axes, uneven dims: values and gradients of the whole tensor.

Checks of the course: 51 (a matrix on 2 x 2 ranks: the layouts in every pair), 52 (what chains of products exchange).
"""

import itertools

import numpy as np
import pytest

from dtrain.collectives import run_threads
from dtrain.layout import Layout, Only, Partial, Replicate, Shard
from dtrain.mesh import Mesh
from dtrain.redistribute import gradient_of, plan, redistribute
from dtrain.tensor import Tensor

SHAPE = (5, 3, 2)
WHOLE = np.random.default_rng(0).integers(-9, 9, SHAPE).astype(np.float64)  # sums of contributions are exact
GRADIENT = np.random.default_rng(1).integers(-9, 9, SHAPE).astype(np.float64)
PLACEMENTS = [Replicate(), Shard(0), Shard(1), Partial()]
ONE_AXIS = [Layout(tp=what) for what in PLACEMENTS]
TWO_AXES = [
    *(Layout(dp=first, tp=second) for first, second in itertools.product(PLACEMENTS, PLACEMENTS)),
    *(Layout(tp=Shard(dim), dp=Shard(dim)) for dim in (0, 1)),  # tp is the outer one
]


def held(whole, mesh, layout):
    """What this rank holds of an array: of a sum, a contribution of its own."""
    part = whole[layout.part(mesh, whole.shape)]
    for axis in layout.axes(Partial):
        random = np.random.default_rng(5).integers(-9, 9, (mesh.size(axis), *whole.shape)).astype(np.float64)
        random[-1] -= random.sum(axis=0)  # they add up to 0
        part = random[mesh.index(axis)][layout.part(mesh, whole.shape)] + (part if mesh.index(axis) == 0 else 0)
    return part.copy()


def summed(array, mesh, layout):
    for axis in layout.axes(Partial):
        array = mesh[axis].all_reduce(array)
    return array


def check_all_pairs(comm, layouts, **sizes):
    mesh = Mesh(comm, **sizes)
    for source, target in itertools.product(layouts, layouts):
        x = Tensor(held(WHOLE, mesh, source), requires_grad=True)
        y = redistribute(x, mesh, source, target, SHAPE)
        said = f"{source} -> {target}"
        expected = WHOLE[target.part(mesh, SHAPE)]
        np.testing.assert_array_equal(summed(y.data, mesh, target), expected, err_msg=said)
        y.backward(GRADIENT[gradient_of(target).part(mesh, SHAPE)])
        np.testing.assert_array_equal(x.grad, GRADIENT[gradient_of(source).part(mesh, SHAPE)], err_msg=said)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_all_pairs_on_one_axis(size):
    run_threads(size, lambda comm: check_all_pairs(comm, ONE_AXIS, tp=size))


def test_all_pairs_on_two_axes():
    run_threads(6, lambda comm: check_all_pairs(comm, TWO_AXES, dp=2, tp=3))


def test_gradients_that_come_in_parts():
    """A result that every rank uses for a part of what follows: Megatron's f, and sequence parallelism's gather."""

    def on_rank(comm):
        mesh = Mesh(comm, tp=3)
        partial = Layout(tp=Partial())
        for source in (Layout(), Layout(tp=Shard(0)), Layout(tp=Shard(1)), partial):
            x = Tensor(held(WHOLE, mesh, source), requires_grad=True)
            y = redistribute(x, mesh, source, Layout(), SHAPE, gradient=partial)
            np.testing.assert_array_equal(y.data, WHOLE)
            y.backward(held(GRADIENT, mesh, partial))
            np.testing.assert_array_equal(x.grad, GRADIENT[gradient_of(source).part(mesh, SHAPE)])

    run_threads(3, on_rank)


def test_chains_of_products_exchange_once():
    """Check 52. (4, 1) then (1, 4): the rows of x are gathered once. Columns, then rows: one sum, and no gather."""
    random = np.random.default_rng(0)
    x, first, second = (random.normal(size=shape) for shape in ((8, 6), (6, 12), (12, 4)))
    rows, columns = Layout(tp=Shard(0)), Layout(tp=Shard(1))

    def part(mesh, whole, layout):
        return Tensor(whole[layout.part(mesh, whole.shape)].copy(), requires_grad=True)

    def rows_then_columns(mesh):
        hidden = redistribute(part(mesh, x, rows) @ Tensor(first), mesh, rows, Layout(), (8, 12))
        return hidden @ part(mesh, second, columns), columns

    def columns_then_rows(mesh):
        partial = Tensor(x) @ part(mesh, first, columns) @ part(mesh, second, rows)
        return redistribute(partial, mesh, Layout(tp=Partial()), Layout(), (8, 4)), Layout()

    def on_rank(comm, chain):
        mesh = Mesh(comm, tp=4)
        y, layout = chain(mesh)
        np.testing.assert_allclose(y.data, (x @ first @ second)[layout.part(mesh, (8, 4))], rtol=1e-12)
        return {key.collective: calls for key, (calls, *_) in mesh["tp"].counters.totals().items()}

    assert run_threads(4, on_rank, rows_then_columns) == [{"all_gather": 1}] * 4
    assert run_threads(4, on_rank, columns_then_rows) == [{"all_reduce": 1}] * 4


def test_the_whole_shape_is_found_out():
    def on_rank(comm):
        mesh = Mesh(comm, dp=2, tp=2)
        source = Layout(dp=Shard(0), tp=Shard(0))
        y = redistribute(Tensor(held(WHOLE, mesh, source)), mesh, source, Layout(tp=Shard(1)))
        np.testing.assert_array_equal(y.data, WHOLE[Layout(tp=Shard(1)).part(mesh, SHAPE)])

    run_threads(4, on_rank)


@pytest.mark.parametrize(
    ("source", "target", "names"),
    [
        (Layout(tp=Shard(0)), Layout(tp=Shard(1)), ["all_to_all over tp"]),
        (Layout(tp=Shard(0)), Layout(tp=Shard(0)), []),
        (Layout(tp=Partial()), Layout(tp=Shard(1)), ["reduce_scatter over tp"]),
        (Layout(dp=Shard(0), tp=Partial()), Layout(tp=Shard(1)), ["reduce_scatter over tp", "all_gather over dp"]),
        (Layout(dp=Shard(0), tp=Shard(0)), Layout(dp=Shard(0)), ["all_gather over tp"]),
        (Layout(dp=Shard(0), tp=Shard(0)), Layout(tp=Shard(0)), ["all_gather over tp", "all_gather over dp", "slice"]),
        (Layout(dp=Shard(0), tp=Shard(0)), Layout(dp=Shard(0), tp=Shard(1)), ["all_to_all over tp"]),
        (Layout(), Layout(dp=Shard(1), tp=Shard(0)), ["slice over dp", "slice over tp"]),
    ],
)
def test_plans(source, target, names):
    told = [str(step) for step in plan(source, target)]
    assert len(told) == len(names) and all(text.startswith(name) for text, name in zip(told, names, strict=True)), told


def test_plans_for_three_axes_end_at_the_target():
    random = np.random.default_rng(0)

    def layout():
        return Layout(**{str(axis): PLACEMENTS[random.integers(4)] for axis in random.permutation(["dp", "cp", "tp"])})

    for _ in range(500):
        source, target = layout(), layout()
        steps = plan(source, target)
        assert len(steps) <= 6 and (steps or source == target), f"{source} -> {target}"
        for step in steps:  # only the innermost axis of a dim can be undone
            assert not isinstance(step.before, Shard) or step.layout.cutters(step.before.dim)[-1] == step.axis


def test_what_a_step_sends():
    (step,) = plan(Layout(tp=Shard(0)), Layout(tp=Shard(1)))
    sent = run_threads(4, lambda comm: step.sent(Mesh(comm, tp=4), (8, 8)))
    assert sent == [12] * 4  # 3/4 of 16 elements
    (gather,) = plan(Layout(tp=Shard(0)), Layout())
    assert run_threads(4, lambda comm: gather.sent(Mesh(comm, tp=4), (8, 8))) == [48] * 4


def test_what_cannot_be_redistributed_is_told():
    def on_rank(comm):
        mesh = Mesh(comm, tp=2)
        x = Tensor(WHOLE)
        with pytest.raises(ValueError, match=r"tp=Only\(coordinates=\(0,\)\); allowed"):
            redistribute(x, mesh, Layout(), Layout(tp=Only((0,))), SHAPE)
        with pytest.raises(ValueError, match=r"tp=Partial\(op='max'\); allowed"):
            redistribute(x, mesh, Layout(tp=Partial("max")), Layout(), SHAPE)
        with pytest.raises(ValueError, match=r"tp=Shard\(3\) does not fit a tensor of shape"):
            redistribute(x, mesh, Layout(), Layout(tp=Shard(3)), SHAPE)
        with pytest.raises(ValueError, match=r"Layout\(tp=Shard\(0\)\) of \(5, 3, 2\) is \([23], 3, 2\)"):
            redistribute(x, mesh, Layout(tp=Shard(0)), Layout(), SHAPE)
        with pytest.raises(ValueError, match="not whole along tp"):
            redistribute(x, mesh, Layout(), Layout(tp=Shard(0)), SHAPE, gradient=Layout(tp=Partial()))

    run_threads(2, on_rank)
