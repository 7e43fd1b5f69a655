"""The engine: accumulation, callbacks, buffers, errors, memory."""

import gc
import threading
import weakref

import numpy as np
import pytest

import dtrain.functional as F
from dtrain.autograd import GraphError, backward, enable_grad, gradients, no_grad
from dtrain.op import Op
from dtrain.tensor import OpError, Tensor, apply


def leaf(*shape, seed=0):
    return Tensor(np.random.default_rng([seed, *shape]).standard_normal(shape), requires_grad=True)


# ---- the walk ----


def test_a_tensor_used_twice_receives_the_sum():
    x = Tensor(3.0, requires_grad=True)
    y1, y2 = x + 1, 2 * x
    loss = (y1 - y2) ** 2
    loss.backward()
    assert loss.item() == 4 and x.grad == 4  # course check A5


def test_the_same_operand_twice():
    x = leaf(3)
    (x * x + x - x / x).sum().backward()
    np.testing.assert_allclose(x.grad, 2 * x.data + 1, atol=1e-15)


def test_gradients_of_0_d_intermediates_add_up():
    x = leaf(3)
    s = x.sum()
    (s + s + s * s).backward()
    np.testing.assert_allclose(x.grad, 2 + 2 * x.data.sum())


def test_adding_in_place_never_touches_a_shared_gradient():
    x, y = leaf(3), leaf(3)
    a, b = x * 1, y * 1
    ((a + b) + a).sum().backward()  # the first gradient of a and of b is one array
    np.testing.assert_array_equal(x.grad, 2)
    np.testing.assert_array_equal(y.grad, 1)


def test_gradients_accumulate_until_cleared():
    x = leaf(3)
    (x * 2).sum().backward()
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, 5)
    x.zero_grad()
    assert x.grad is None
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, 3)


def test_deep_chains_do_not_recurse():
    x = y = leaf(2)
    for _ in range(5000):
        y = y + 1
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, 1)


def test_python_branches_and_loops_differentiate():
    def f(x):
        while x.data.sum() < 100:
            x = x * 2 if x.data[0] > 0 else x + 50
        return x.sum()

    x = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    f(x).backward()
    np.testing.assert_array_equal(x.grad, 64)


def test_only_what_needs_a_gradient_is_recorded():
    x, constant = leaf(3), Tensor(np.ones(3))
    y = constant * 2
    assert y.node is None and not y.requires_grad
    (x * y).sum().backward()
    assert constant.grad is None
    with no_grad():
        assert (x * 2).node is None
        with enable_grad():
            assert (x * 2).node is not None
        assert (x * 2).node is None
    assert no_grad()(lambda: x * 2)().node is None
    assert (x * 2).detach().node is None


def test_the_mode_belongs_to_the_thread():
    x, seen = leaf(2), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_backward_with_a_gradient_and_several_roots():
    x = leaf(2, 3)
    (x * 2).backward(np.full((2, 3), 5.0))
    np.testing.assert_array_equal(x.grad, 10)
    y, z = x * 3, x * 4
    backward([(y, np.ones((2, 3))), (z, np.ones((2, 3))), (x, np.ones((2, 3)))])
    np.testing.assert_array_equal(x.grad, 18)


def test_gradients_returns_them_and_touches_nothing():
    x, w = leaf(3), leaf(3)
    w.on_gradient(lambda g: pytest.fail("called"))
    y = (x * w).sum()
    (found,) = gradients([(y, np.ones(()))], [x])
    np.testing.assert_array_equal(found, w.data)
    assert x.grad is None and w.grad is None
    with pytest.raises(GraphError, match="second time"):
        gradients([(y, np.ones(()))], [x])


def test_gradients_leaves_buffers_and_what_was_added_up_alone():
    table, weight, x = leaf(3, 2), leaf(4, 2), leaf(5, 2)
    table.grad, weight.buffer = np.full((3, 2), 7.0), np.full((4, 2), 9.0)
    y = F.embedding(table, np.array([0, 0])).sum() + F.linear(x, weight).sum()
    found = gradients([(y, np.ones(()))], [table, weight], retain_graph=True)
    np.testing.assert_array_equal(found[0], [[2, 2], [0, 0], [0, 0]])
    np.testing.assert_allclose(found[1], np.tile(x.data.sum(0), (4, 1)))
    np.testing.assert_array_equal(table.grad, 7)
    np.testing.assert_array_equal(weight.buffer, 9)
    y.backward()  # of all leaves, also of those that were not asked for
    np.testing.assert_array_equal(table.grad[0], 9)
    np.testing.assert_allclose(x.grad, np.tile(weight.data.sum(0), (5, 1)))


def test_arrays_die_as_soon_as_nobody_needs_them():
    """A chain of additions keeps no intermediate: the tape holds nodes, not their outputs."""
    x = leaf(4)
    middle = x + 1
    watch = weakref.ref(middle.data)
    y = (middle + 1).sum()
    del middle
    gc.collect()
    assert watch() is None
    y.backward()
    np.testing.assert_array_equal(x.grad, 1)


def test_the_graph_is_freed_by_the_walk():
    x = leaf(4)
    y = x.exp()
    z = y.sum()
    watch = weakref.ref(y.data)
    z.backward()
    del y
    assert watch() is None  # although z is still there


# ---- callbacks and buffers ----


def test_a_leaf_callback_fires_once_with_the_complete_gradient():
    x, calls = leaf(3), []
    x.on_gradient(lambda g: calls.append(g.copy()))
    (x * 2 + F.checkpoint(lambda t: t * x, x + 0)).sum().backward()
    assert len(calls) == 1
    np.testing.assert_array_equal(calls[0], x.grad)
    (x * 2).sum().backward()
    assert len(calls) == 2


def test_callbacks_fire_while_the_walk_goes_on():
    """The last layer's gradient is complete before the first layer's vjp runs: that is what overlap needs."""
    first, last, events = leaf(2, 2), leaf(2, 2, seed=1), []
    x = Tensor(np.ones((1, 2)))
    spy = Op("spy", lambda a: (a + 0, None), lambda node, g: (events.append("vjp"), (g,))[1])
    last.on_gradient(lambda g: events.append("last"))
    first.on_gradient(lambda g: events.append("first"))
    F.linear(apply(spy, F.linear(x, first)), last).sum().backward()
    assert events == ["last", "vjp", "first"]


def test_a_callback_may_replace_the_gradient():
    x = leaf(3)
    x.on_gradient(lambda g: g * 10)
    y = x * 2
    y.on_gradient(lambda g: g * 7)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, 140)


def test_the_callback_of_an_unused_leaf_stays_silent():
    x, unused = leaf(3), leaf(3)
    unused.on_gradient(lambda g: pytest.fail("called"))
    x.sum().backward()
    assert unused.grad is None


def test_weight_gradients_are_written_straight_into_the_buffer():
    w = leaf(4, 3)
    w.buffer = np.full((4, 3), np.nan)  # whatever was there is overwritten
    x = leaf(5, 3)
    returned = []
    node = F.linear(x, w)
    vjp = node.node.op.vjp
    node.node.op = Op("linear", lambda *a: None, lambda n, g: returned.append(vjp(n, g)) or returned[-1])
    node.backward(np.ones((5, 4)))
    assert returned[0][1] is w.buffer and w.grad is w.buffer
    np.testing.assert_allclose(w.grad, np.ones((4, 5)) @ x.data)
    F.linear(x, w).sum().backward()  # the second one is added
    assert w.grad is w.buffer
    np.testing.assert_allclose(w.grad, 2 * np.ones((4, 5)) @ x.data)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_tied_weight_collects_from_lookup_and_product(buffered):
    w = leaf(6, 3)
    ids = np.array([1, 1, 5])
    loss = F.linear(F.embedding(w, ids), w).sum()
    if buffered:
        w.buffer = np.full((6, 3), np.nan)
    loss.backward()
    rows = w.data[ids]
    expected = np.ones((6, 3)) @ rows
    np.add.at(expected, ids, np.ones((3, 6)) @ w.data)
    np.testing.assert_allclose(w.grad, expected)
    assert (w.grad is w.buffer) == buffered


def test_the_buffer_of_a_table_is_cleared_before_rows_are_added():
    table = leaf(4, 2)
    table.buffer = np.full((4, 2), np.nan)
    F.embedding(table, np.array([3, 3, 0])).sum().backward()
    assert table.grad is table.buffer
    np.testing.assert_array_equal(table.grad, [[1, 1], [0, 0], [0, 0], [2, 2]])


def test_a_weight_used_twice_by_one_op_is_not_overwritten():
    w = leaf(3, 3)
    w.buffer = np.zeros((3, 3))
    (w @ w).sum().backward()
    ones = np.ones((3, 3))
    np.testing.assert_allclose(w.grad, ones @ w.data.T + w.data.T @ ones)


# ---- mistakes ----


def test_a_second_backward_names_the_remedy():
    x = leaf(3)
    loss = (x * x).sum()
    loss.backward()
    with pytest.raises(GraphError, match="retain_graph=True"):
        loss.backward()
    loss = (x * x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    np.testing.assert_allclose(x.grad, 6 * x.data)


def test_backward_needs_a_tape_and_a_gradient_of_the_right_shape():
    x = leaf(3)
    with pytest.raises(GraphError, match="needs no gradient"):
        x.detach().sum().backward()
    with pytest.raises(GraphError, match=r"\(3,\)"):
        (x * 2).backward()
    with pytest.raises(GraphError, match=r"\(3,\).*\(2,\)"):
        (x * 2).backward(np.ones(2))


def test_in_place_changes_that_the_tape_cannot_see_are_refused():
    x = leaf(3)
    with pytest.raises(GraphError, match="no_grad"):
        x[0] = 1
    y = x * 2
    with pytest.raises(GraphError, match="result of scale"):
        y += 1
    for change in (lambda t: t.assign(0.0), lambda t: t.__imul__(2), lambda t: t.__itruediv__(2)):
        constant = Tensor(np.ones(3))
        z = (x * constant).sum()
        change(constant)
        with pytest.raises(GraphError, match=r"input 1 of mul\(\[3\], \[3\]\).*changed in place"):
            z.backward()


def test_in_place_changes_of_leaves_and_results_after_the_forward_are_found():
    x = leaf(3)
    y = x.exp()
    z = (y * y).sum()
    with no_grad():
        y += 1
    with pytest.raises(GraphError, match="changed in place"):
        z.backward()
    z = (x * x).sum()
    with no_grad():
        x -= 0.1
    with pytest.raises(GraphError, match="changed in place"):
        z.backward()
    (x * x).sum().backward()  # changed before it is used: fine


def test_tensors_of_tensors_and_of_integers():
    with pytest.raises(TypeError, match="detach"):
        Tensor(leaf(2))
    with pytest.raises(TypeError, match="int64"):
        Tensor(np.arange(3), requires_grad=True)
    with pytest.raises(TypeError, match="no gradient"):
        leaf(2).astype(np.int32)
    assert Tensor(2.5).dtype == np.float64 and len(Tensor([1.0, 2.0])) == 2
    assert (np.ones(2) + leaf(2)).node.op.name == "add"


def test_tensors_among_pythons_and_numpys_ways():
    x = leaf(3, 2)
    assert [row.node.op.name for row in x] == ["index"] * 3
    sum([row.sum() for row in x]).backward()
    np.testing.assert_array_equal(x.grad, 1)
    np.testing.assert_array_equal(np.asarray(x.detach()), x.data)
    with pytest.raises(GraphError, match="leave the tape"):
        np.stack([x, x])
    assert Tensor(1.0) and not Tensor(0.0)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x)
    assert "requires_grad=True" in repr(x) and "from scale" in repr(x * 2)


def test_a_vjp_of_the_wrong_number_or_shape_is_named():
    x = leaf(3)
    few = Op("few", lambda a, b: (a + b, None), lambda node, g: (g,))
    with pytest.raises(GraphError, match=r"few\(\[3\], \[3\]\).*1 gradients, not 2"):
        apply(few, x, x).sum().backward()
    flat = Op("flat", lambda a: (a, None), lambda node, g: (g.sum(),))
    with pytest.raises(GraphError, match=r"flat\(\[3\]\).*shape \(\)"):
        apply(flat, x).sum().backward()


def test_a_missing_gradient_is_zero():
    stop = Op("stop", lambda a: (a + 0, None), lambda node, g: (None,))
    x = leaf(3)
    apply(stop, x * 2).sum().backward()
    np.testing.assert_array_equal(x.grad, 0)


def test_an_op_error_keeps_its_cause():
    with pytest.raises(OpError, match=r"add\(float64\[2\], float64\[3\]\): .*broadcast"):
        leaf(2) + leaf(3)
