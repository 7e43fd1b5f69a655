import numpy as np
import pytest

import dtrain.collectives
from dtrain.flat import FlatBuffers
from dtrain.optimizers import clip_factor, global_norm
from dtrain.parameter import Constant, Normal, Parameter

SHAPES = {"embedding": (7, 5), "norm": (5,), "weight": (3, 5), "bias": (3,), "cube": (2, 3, 4), "scalar": ()}


def make(shapes=SHAPES, dtype=np.float32, seed=0):
    parameters = {}
    for name, shape in shapes.items():
        parameter = Parameter(shape, Normal(1.0), dtype)
        parameter.name = name
        parameter.data = parameter.initial_values(seed)
        parameters[name] = parameter
    return parameters


def flat_of(parameters, pad_to=1):
    return FlatBuffers(parameters, dtrain.collectives.single(), pad_to)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("pad_to", [1, 3, 7 * 64])
def test_views_keep_values_and_are_aligned(dtype, pad_to):
    parameters = make(dtype=dtype)
    before = {name: parameter.data.copy() for name, parameter in parameters.items()}
    (group,) = flat_of(parameters, pad_to).groups
    assert group.data.ndim == 1 and group.data.shape == group.grad.shape and group.size % pad_to == 0
    covered = np.zeros(group.size, int)
    for name, parameter in parameters.items():
        where = group.slices[name]
        covered[where] += 1
        np.testing.assert_array_equal(parameter.data, before[name])
        assert np.shares_memory(parameter.data, group.data[where]) or parameter.size == 0
        assert np.shares_memory(parameter.buffer, group.grad[where])
        assert parameter.buffer.shape == parameter.data.shape == SHAPES[name]
        assert where.start * group.data.itemsize % 64 == 0
    assert covered.max() == 1  # no overlap
    assert not group.data[covered == 0].any() and not group.grad.any()


def test_vectors_first_each_kind_in_order():
    (group,) = flat_of(make()).groups
    assert list(group.slices) == ["norm", "bias", "scalar", "embedding", "weight", "cube"]
    border = group.slices["embedding"].start
    assert group.runs(slice(0, group.size)) == [(slice(0, border), False), (slice(border, group.size), True)]
    assert group.runs(slice(border, border + 4)) == [(slice(0, 4), True)]
    assert group.runs(slice(2, border)) == [(slice(0, border - 2), False)]
    assert group.runs(slice(border - 1, border + 2)) == [(slice(0, 1), False), (slice(1, 3), True)]


@pytest.mark.parametrize("names, runs", [(["norm", "bias"], [False]), (["weight"], [True])])
def test_runs_of_one_kind_only(names, runs):
    (group,) = flat_of(make({name: SHAPES[name] for name in names})).groups
    assert [decayed for _, decayed in group.runs(slice(0, group.size))] == runs


def test_pieces_of_any_cut_are_the_parameters():
    parameters = make()
    (group,) = flat_of(parameters, pad_to=64).groups
    for step in (1, 5, 16, group.size):
        rebuilt = {name: np.full(parameter.size, np.nan) for name, parameter in parameters.items()}
        for start in range(0, group.size, step):
            part = slice(start, min(start + step, group.size))
            for piece in group.pieces(part):
                rebuilt[piece.name][piece.inside] = group.data[part][piece.where].ravel()
                whole = piece.inside == slice(0, parameters[piece.name].size)
                assert piece.shape == (SHAPES[piece.name] if whole else (piece.inside.stop - piece.inside.start,))
        for name, parameter in parameters.items():
            np.testing.assert_array_equal(rebuilt[name], parameter.data.ravel())


def test_one_group_per_dtype():
    parameters = make({"a": (3, 3)}) | make({"b": (4,)}, np.float64)
    flat = flat_of(parameters)
    assert [(group.dtype, list(group.slices)) for group in flat.groups] == [
        (np.float32, ["a"]),
        (np.float64, ["b"]),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_initialise_draws_what_has_no_values_and_takes_the_rest_from_rank_0(size, dtype):
    def on_rank(comm):
        parameters = {}
        for name, shape in SHAPES.items():
            parameters[name] = Parameter(shape, Constant(2.5) if name == "norm" else Normal(1.0), dtype)
            parameters[name].name = name
        parameters["bias"].data = np.full(3, 10 + comm.rank, dtype)  # has values, other ones on each rank
        flat = FlatBuffers(parameters, comm)
        flat.initialise(7, comm)
        return {name: parameter.data.copy() for name, parameter in parameters.items()}

    drawn = make(dtype=dtype, seed=7)
    for values in dtrain.collectives.run_threads(size, on_rank):
        for name in SHAPES:
            expected = {"norm": np.full(5, 2.5), "bias": np.full(3, 10)}.get(name, drawn[name].data)
            np.testing.assert_array_equal(values[name], expected, err_msg=name)


def test_gradients_arrive_in_the_buffer_and_stale_ones_do_not_count():
    parameters = make({"a": (2, 2), "b": (2,)})
    flat = flat_of(parameters)
    (group,) = flat.groups
    total = parameters["a"] * 3.0 + parameters["b"]
    total.backward(np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(group.grad[group.slices["a"]], [3, 3, 3, 3])
    np.testing.assert_array_equal(group.grad[group.slices["b"]], [2, 2])
    assert parameters["a"].grad is parameters["a"].buffer and flat.missing() == []
    assert global_norm(flat) == pytest.approx(np.sqrt(4 * 9 + 2 * 4))

    flat.zero_grad()
    assert flat.missing() == ["a", "b"]
    (parameters["b"] * 2.0).backward(np.ones(2, np.float32))
    assert flat.missing() == ["a"]
    assert global_norm(flat) == pytest.approx(np.sqrt(2 * 4))  # the old gradient of a is gone
    assert not group.grad[group.slices["a"]].any() and flat.missing() == []


def test_global_norm_is_summed_in_float64():
    parameters = make({"a": (1000, 1000), "b": (3,)})
    flat = flat_of(parameters)
    flat.groups[0].grad[flat.groups[0].slices["a"]] = 0.1
    for parameter in parameters.values():
        parameter.grad = parameter.buffer
    assert global_norm(flat) == pytest.approx(1000 * float(np.float32(0.1)), rel=1e-12)


def test_clip_factor():
    assert clip_factor(5.0, None) == 1.0
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert np.isnan(clip_factor(float("nan"), 1.0)) and np.isnan(clip_factor(float("inf"), 1.0))
    assert clip_factor(float("inf"), None) == 1.0
