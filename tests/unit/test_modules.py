import numpy as np
import pytest
from scipy import stats

from dtrain import random
from dtrain.autograd import tracing
from dtrain.modules import Constant, Context, Dropout, Embedding, LayerNorm, Linear, Module, Normal, Parameter, RMSNorm
from dtrain.tensor import Tensor


class Inner(Module):
    def __init__(self, shared=None):
        self.linear = Linear(3, 3, weight=shared)
        self.nothing = None
        self.number = 7

    def forward(self, x):
        return self.linear(x)


class Outer(Module):
    def __init__(self):
        self.embedding = Embedding(5, 3)
        self.layers = [Inner(), Inner()]
        self.scale = Parameter((3,), Constant(2.0))
        self.tied = Linear(3, 3, bias=False, weight=self.layers[0].linear.weight)
        self.assign_names()

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.tied(x * self.scale)


NAMES = [
    "embedding.weight",
    "layers.0.linear.weight",
    "layers.0.linear.bias",
    "layers.1.linear.weight",
    "layers.1.linear.bias",
    "scale",
]


def test_parameters_are_found_in_order_shared_ones_once():
    model = Outer()
    found = model.named_parameters()
    assert list(found) == NAMES
    assert [parameter.name for parameter in found.values()] == NAMES
    assert model.tied.weight is found["layers.0.linear.weight"]
    assert model.num_parameters() == 3 + 15 + 2 * (9 + 3)
    assert list(model.named_modules()) == [
        "",
        "embedding",
        "layers.0",
        "layers.0.linear",
        "layers.1",
        "layers.1.linear",
        "tied",
    ]
    assert model.layers[1].linear.name == "layers.1.linear"


def test_nothing_has_memory_before_materialise():
    model = Linear(1 << 20, 1 << 20)  # 4 TiB
    model.assign_names()
    assert model.num_parameters() == (1 << 40) + (1 << 20)
    assert model.weight.is_placeholder and model.weight.shape == (1 << 20, 1 << 20)
    part = model.weight.initial_values(0, (slice(5, 6),))  # a slice of it can be had
    assert part.shape == (1, 1 << 20) and part.dtype == np.float32
    assert np.std(part) == pytest.approx(0.02, rel=0.01)


def test_materialise_fills_what_is_empty_and_only_that():
    model = Outer()
    model.embedding.weight.data = np.ones((5, 3), np.float32)
    model.materialise(seed=4)
    values = {name: parameter.data for name, parameter in model.named_parameters().items()}
    assert not any(parameter.is_placeholder for parameter in model.named_parameters().values())
    assert all(array.flags.writeable and array.flags.c_contiguous for array in values.values())
    np.testing.assert_array_equal(values["scale"], [2, 2, 2])
    np.testing.assert_array_equal(values["embedding.weight"], np.ones((5, 3)))
    np.testing.assert_array_equal(values["layers.0.linear.bias"], 0)
    np.testing.assert_array_equal(
        values["layers.1.linear.weight"], random.normal(4, "layers.1.linear.weight", (3, 3), 0.02)
    )
    assert (values["layers.0.linear.weight"] != values["layers.1.linear.weight"]).all()


@pytest.mark.parametrize("initial", [Normal(0.5), Constant(3.0)])
@pytest.mark.parametrize("part", [(), (slice(2, 5),), (slice(0, 7), slice(1, 3)), (slice(3, 3), slice(None))])
def test_a_slice_of_the_initial_values_is_the_slice_of_the_whole(initial, part):
    parameter = Parameter((7, 4), initial, np.float64)
    parameter.name = "w"
    whole, cut = parameter.initial_values(9), parameter.initial_values(9, part)
    assert whole.shape == (7, 4) and cut.dtype == np.float64
    np.testing.assert_array_equal(cut, whole[part])


def test_a_parameter_without_a_name_has_no_initial_values():
    with pytest.raises(ValueError, match="call assign_names"):
        Parameter((2,), Normal(1.0)).initial_values(0)


def test_layers_against_numpy():
    generator = np.random.default_rng(0)
    x, weight, bias = generator.normal(size=(2, 5, 4)), generator.normal(size=(3, 4)), generator.normal(size=3)
    linear = Linear(4, 3, dtype=np.float64)
    linear.weight.data, linear.bias.data = weight, bias
    np.testing.assert_allclose(linear(Tensor(x)).data, np.einsum("bti,oi->bto", x, weight) + bias, rtol=1e-12)
    np.testing.assert_allclose(linear.product(Tensor(x)).data, np.einsum("bti,oi->bto", x, weight), rtol=1e-12)

    scale, shift = generator.normal(size=4), generator.normal(size=4)
    norm = LayerNorm(4, dtype=np.float64)
    norm.weight.data, norm.bias.data = scale, shift
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(Tensor(x)).data, normal * scale + shift, rtol=1e-10)
    norm = LayerNorm(4, bias=False, dtype=np.float64)
    norm.weight.data = scale
    np.testing.assert_allclose(norm(Tensor(x)).data, normal * scale, rtol=1e-10)
    assert list(norm.named_parameters()) == ["weight"]

    norm = RMSNorm(4, dtype=np.float64)
    norm.weight.data = scale
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(norm(Tensor(x)).data, expected, rtol=1e-10)

    embedding = Embedding(6, 4, dtype=np.float64)
    embedding.weight.data = generator.normal(size=(6, 4))
    ids = np.array([[5, 0], [0, 3]])
    np.testing.assert_array_equal(embedding(ids).data, embedding.weight.data[ids])


def test_modules_name_the_nodes_of_a_traced_graph():
    model = Outer()
    model.materialise(0)
    ids = np.array([[0, 1]])
    with tracing():
        y = model(ids)
    scopes, node = [], y.node
    while node is not None:
        scopes.append(node.scope)
        node = next((each for each in node.inputs if not isinstance(each, Tensor)), None)
    assert scopes[0] == "tied" and "layers.1.linear" in scopes and "layers.0.linear" in scopes
    assert model(ids).node.scope == ""  # outside of tracing nobody pays for names


# Dropout


def dropout(p=0.5, name="blocks.0.dropout"):
    layer = Dropout(p)
    layer.name = name
    return layer


def context(rows, step=3, seed=1):
    return Context(seed, step, np.asarray(rows, np.int64))


def test_dropout_only_with_a_context():
    x = Tensor(np.ones((2, 3, 4)))
    assert dropout()(x) is x and dropout()(x, None) is x
    assert dropout(0.0)(x, context([0, 1])) is x
    assert not dropout().active(None) and not dropout(0.0).active(context([0])) and dropout().active(context([0]))


def test_dropout_keeps_the_right_share_and_the_mean():
    y = dropout(0.3)(Tensor(np.ones((50, 40, 30))), context(np.arange(50))).data
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / 0.7, rtol=1e-12)
    assert stats.binomtest(int(kept.sum()), kept.size, 0.7).pvalue > 1e-4
    # Also per token and per channel no structure: counts along each dim are binomial.
    for dim, count in ((0, 1200), (1, 1500), (2, 2000)):
        counts = kept.sum(axis=tuple({0, 1, 2} - {dim}))
        assert abs(counts - 0.7 * count).max() < 5 * np.sqrt(count * 0.21)


def test_the_mask_belongs_to_the_sample_not_to_the_batch():
    x = np.ones((4, 6, 8))
    whole = dropout()(Tensor(x), context([10, 11, 12, 13])).data
    halves = [dropout()(Tensor(x[:2]), context(rows)).data for rows in ([10, 11], [12, 13])]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    shuffled = dropout()(Tensor(x), context([13, 10, 12, 11])).data
    np.testing.assert_array_equal(shuffled, whole[[3, 0, 2, 1]])


def test_masks_differ_between_samples_tokens_steps_seeds_and_layers():
    x = Tensor(np.ones((2, 2, 64)))
    base = dropout()(x, context([5, 6])).data
    rows = base.reshape(4, 64)
    assert len({row.tobytes() for row in rows}) == 4
    others = [
        dropout()(x, context([5, 6], step=4)).data,
        dropout()(x, context([5, 6], seed=2)).data,
        dropout(name="blocks.1.dropout")(x, context([5, 6])).data,
        dropout()(x, context([7, 8])).data,
    ]
    assert all(not np.array_equal(base, other) for other in others)


def test_dropout_of_rows_without_tokens():
    x = np.ones((6, 16))
    whole = dropout()(Tensor(x), context(range(6))).data
    np.testing.assert_array_equal(whole[4:], dropout()(Tensor(x[4:]), context([4, 5])).data)
