"""Every collective of the tape inside a small function of a replicated x, against the same function on one rank."""

import numpy as np
import pytest

from dtrain import conjugate
from dtrain.collectives import run_threads
from dtrain.gradcheck import gradcheck
from dtrain.tensor import Tensor

ROWS, COLUMNS = 5, 3
X = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
WEIGHT = np.random.default_rng(1).standard_normal((9, ROWS, COLUMNS))  # of rank i


def factor(size):
    return WEIGHT[:size].sum(axis=0)


def copied_and_reduced(x, comm):
    return conjugate.all_reduce(conjugate.copy(x, comm).sin() * WEIGHT[comm.rank], comm)


def split_and_gathered(x, comm):
    return conjugate.gather(conjugate.split(x, comm, 0).sin(), comm, 0, ROWS)


def split_and_gathered_columns(x, comm):
    return conjugate.gather(conjugate.split(x, comm, -1).sin(), comm, -1)


def gathered_for_parts(x, comm):
    mine = conjugate.split(x, comm, 1).sin()
    return conjugate.all_reduce(conjugate.all_gather(mine, comm, 1, COLUMNS) * WEIGHT[comm.rank], comm)


def reduced_and_scattered(x, comm, dim=0):
    parts = conjugate.copy(x, comm) * WEIGHT[comm.rank]
    return conjugate.gather(conjugate.reduce_scatter(parts, comm, dim).sin(), comm, dim)


def reduced_and_scattered_columns(x, comm):
    return reduced_and_scattered(x, comm, 1)


def there_and_back(x, comm):
    rows = conjugate.split(x, comm, 0)
    columns = conjugate.all_to_all(rows, comm, split_dim=1, concat_dim=0, length=ROWS)
    columns = columns * columns.sum(dim=0, keepdims=True)  # needs whole columns
    return conjugate.gather(conjugate.all_to_all(columns, comm, split_dim=0, concat_dim=1), comm, 0, ROWS)


CASES = {
    copied_and_reduced: lambda size: np.sin(X) * factor(size),
    split_and_gathered: lambda size: np.sin(X),
    split_and_gathered_columns: lambda size: np.sin(X),
    gathered_for_parts: lambda size: np.sin(X) * factor(size),
    reduced_and_scattered: lambda size: np.sin(X * factor(size)),
    reduced_and_scattered_columns: lambda size: np.sin(X * factor(size)),
    there_and_back: lambda size: X * X.sum(axis=0),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_equals_one_rank_in_value_and_both_modes(function, size):
    def on_rank(comm):
        gradcheck(lambda x: function(x, comm), X)  # x moves on all ranks alike
        return function(Tensor(X), comm).data

    for value in run_threads(size, on_rank):
        np.testing.assert_allclose(value, CASES[function](size), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_broadcast_and_reduce_have_their_gradient_at_the_root(size):
    root = size - 1

    def on_rank(comm):
        x = Tensor(X + comm.rank, requires_grad=True)
        parts = conjugate.broadcast(x, comm, root).sin() * WEIGHT[comm.rank]
        total = conjugate.reduce(parts, comm, root)
        shared = total.exp() if comm.rank == root else total * 0.0
        shared.backward(np.ones_like(X))
        return total.data, x.grad

    seen = X + root
    product = np.sin(seen) * factor(size)
    for rank, (total, gradient) in enumerate(run_threads(size, on_rank)):
        np.testing.assert_allclose(total, product if rank == root else 0 * X, rtol=1e-12)
        expected = np.exp(product) * factor(size) * np.cos(seen)
        np.testing.assert_allclose(gradient, expected if rank == root else 0 * X, rtol=1e-12)


def test_a_chain_of_ranks_is_one_function():
    def on_rank(comm):
        last = comm.size - 1
        x = Tensor(X, requires_grad=True) if comm.rank == 0 else conjugate.recv(X.shape, X.dtype, comm, comm.rank - 1)
        y = (x * 1.5).sin()
        if comm.rank < last:
            conjugate.send(y, comm, comm.rank + 1).backward()
            return x.grad
        y.backward(np.ones_like(X))
        return y.data

    def chain(x):
        for _ in range(4):
            x = (x * 1.5).sin()
        return x

    first, *_, last = run_threads(4, on_rank)
    whole = Tensor(X, requires_grad=True)
    y = chain(whole)
    y.backward(np.ones_like(X))
    np.testing.assert_array_equal(last, y.data)
    np.testing.assert_array_equal(first, whole.grad)


def test_wrong_arguments_are_told():
    def on_rank(comm):
        x = Tensor(X)
        with pytest.raises(ValueError, match="dim=2 of a tensor of shape"):
            conjugate.gather(x, comm, 2, ROWS)
        with pytest.raises(ValueError, match=r"length=7: rank . of 2 has [34] of it, not 5"):
            conjugate.all_gather(x, comm, 0, 7)
        with pytest.raises(ValueError, match="split_dim and concat_dim are both 1"):
            conjugate.all_to_all(x, comm, 1, 1)

    run_threads(2, on_rank)
