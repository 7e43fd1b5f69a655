"""Every optimizer against the formulas of its paper, parameter by parameter in float64, over several steps."""

import itertools

import numpy as np
import pytest

import dtrain.collectives
from dtrain import config as c
from dtrain import optimizers
from dtrain.flat import FlatBuffers
from dtrain.parameter import Normal, Parameter

SHAPES = {"embedding": (9, 4), "norm": (4,), "weight": (6, 4), "bias": (6,), "cube": (2, 3, 5)}
STEPS = 5
DECAY = 0.1


def make(dtype, shapes=SHAPES):
    parameters = {}
    for name, shape in shapes.items():
        parameters[name] = parameter = Parameter(shape, Normal(0.5), dtype)
        parameter.name = name
        parameter.data = parameter.initial_values(3)
    if "bias" in parameters:
        parameters["bias"].data[:] = 0  # as every bias begins
    return parameters, FlatBuffers(parameters, dtrain.collectives.single())


def gradients(step, shapes=SHAPES):
    generator = np.random.default_rng(100 + step)
    return {name: generator.normal(size=shape) * 10.0 ** generator.integers(-3, 2) for name, shape in shapes.items()}


def train(config, dtype=np.float64, steps=STEPS, scale=1.0, optimizer=None, parts=None, start=1):
    if parts is None:
        parts = make(dtype)
    parameters, flat = parts
    if optimizer is None:
        optimizer = optimizers.build(config, flat)
    for step in range(start, start + steps):
        for name, gradient in gradients(step).items():
            parameters[name].buffer[...] = gradient
            parameters[name].grad = parameters[name].buffer
        optimizer.step(rate(config, step), scale)
        flat.zero_grad()
    return parameters, flat, optimizer


def rate(config, step):
    return config.learning_rate / step


# The papers, one parameter at a time. Each gets p and the list of (learning rate, gradient), and returns p.


def paper_sgd(config, p, history, decay):
    m = 0.0
    for lr, g in history:
        g = g + decay * p
        m = config.momentum * m + g
        p = p - lr * (g + config.momentum * m if config.nesterov else m)
    return p


def paper_adam(config, p, history, decay):
    m = v = 0.0
    beta1, beta2 = config.betas
    for t, (lr, g) in enumerate(history, 1):
        if config.kind == "adam":
            g = g + decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        if config.kind == "adamw":
            p = p - lr * decay * p
        p = p - lr * m_hat / (np.sqrt(v_hat) + config.epsilon)
    return p


def paper_lamb(config, p, history, decay):
    m = v = 0.0
    beta1, beta2 = config.betas
    for t, (lr, g) in enumerate(history, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        r = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + config.epsilon)
        u = r + decay * p
        ratio = np.linalg.norm(p.ravel()) / np.linalg.norm(u.ravel()) if p.ndim >= 2 else 1.0
        p = p - lr * ratio * u
    return p


def paper_adafactor(config, p, history, decay):
    r = c_ = v = 0.0
    eps1, eps2 = config.epsilon
    for t, (lr, g) in enumerate(history, 1):
        beta = 1 - t**-config.decay
        square = g**2 + eps1
        if p.ndim >= 2:
            r = beta * r + (1 - beta) * square.sum(axis=-1)
            c_ = beta * c_ + (1 - beta) * square.sum(axis=-2)
            v_hat = r[..., :, None] * c_[..., None, :] / r.sum(axis=-1)[..., None, None]
        else:
            v_hat = v = beta * v + (1 - beta) * square
        u = g / np.sqrt(v_hat)
        u = u / max(1, np.sqrt(np.mean(u**2)) / config.clip_threshold)
        alpha = max(eps2, np.sqrt(np.mean(p**2))) * lr
        p = p - alpha * u - alpha * decay * p
    return p


CASES = {
    "sgd": (c.SGDConfig(learning_rate=0.1, momentum=0.9, weight_decay=DECAY), paper_sgd),
    "plain sgd": (c.SGDConfig(learning_rate=0.1, momentum=0.0), paper_sgd),
    "nesterov": (c.SGDConfig(learning_rate=0.1, momentum=0.8, nesterov=True, weight_decay=DECAY), paper_sgd),
    "adam": (c.AdamConfig(learning_rate=0.1, betas=(0.8, 0.95), weight_decay=DECAY), paper_adam),
    "adamw": (c.AdamWConfig(learning_rate=0.1, betas=(0.8, 0.95), weight_decay=DECAY), paper_adam),
    "lamb": (c.LAMBConfig(learning_rate=0.1, weight_decay=DECAY), paper_lamb),
    "adafactor": (c.AdafactorConfig(learning_rate=0.1, weight_decay=DECAY, clip_threshold=0.9), paper_adafactor),
}
every = pytest.mark.parametrize("name", CASES)


def expected(config, paper, start, scale=1.0):
    steps = [(rate(config, step), gradients(step)) for step in range(1, STEPS + 1)]
    return {
        name: paper(config, p, [(lr, g[name] * scale) for lr, g in steps], config.weight_decay if p.ndim >= 2 else 0.0)
        for name, p in start.items()
    }


def start_values(dtype):
    return {name: parameter.data.astype(np.float64) for name, parameter in make(dtype)[0].items()}


def test_every_kind_of_the_configuration_has_a_row():
    assert {config.kind for config, _ in CASES.values()} == set(optimizers.OPTIMIZERS)


@every
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_follows_its_paper(name, dtype, tolerance, scale):
    config, paper = CASES[name]
    parameters, flat, optimizer = train(config, dtype, scale=scale)
    want = expected(config, paper, start_values(dtype), scale)
    for key, parameter in parameters.items():
        assert parameter.dtype == dtype and parameter.version == STEPS
        np.testing.assert_allclose(parameter.data, want[key], rtol=tolerance, atol=tolerance, err_msg=key)
    assert optimizer.steps == STEPS
    (group,) = flat.groups
    outside = np.ones(group.size, bool)
    for where in group.slices.values():
        outside[where] = False
    assert outside.any() and not group.data[outside].any()  # the gaps stay 0


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_follows_a_float32_master_copy(name, dtype):
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    config, paper = CASES[name]
    parameters, _, optimizer = train(config, dtype)
    steps = [
        (rate(config, step), {k: g.astype(dtype).astype(np.float64) for k, g in gradients(step).items()})
        for step in range(1, STEPS + 1)
    ]
    masters = optimizer.per_parameter_state()
    for key, start in start_values(dtype).items():
        decay = config.weight_decay if start.ndim >= 2 else 0.0
        want = paper(config, start, [(lr, g[key]) for lr, g in steps], decay)
        master = masters[f"{key}.master"]
        assert master.dtype == np.float32
        np.testing.assert_allclose(master, want, rtol=2e-5, atol=2e-5, err_msg=key)
        np.testing.assert_array_equal(parameters[key].data, master.astype(dtype))


def test_a_tiny_step_is_not_lost_in_half_precision():
    parameters, flat = make(np.float16, {"weight": (2, 2)})
    parameters["weight"].data[...] = 1
    optimizer = optimizers.build(c.SGDConfig(learning_rate=1e-4, momentum=0.0), flat)
    for _ in range(20):  # 1 - 1e-4 rounds to 1 in float16, whose spacing below 1 is 4.9e-4
        parameters["weight"].buffer[...] = 1
        parameters["weight"].grad = parameters["weight"].buffer
        optimizer.step(1e-4)
    np.testing.assert_allclose(parameters["weight"].data, 1 - 20e-4, atol=3e-4)
    assert (parameters["weight"].data < 1).all()


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_continues_bit_for_bit_from_its_state(name, dtype):
    config, _ = CASES[name]
    whole, _, _ = train(config, dtype)
    first, _, before = train(config, dtype, steps=2)
    saved = {key: array.copy() for key, array in before.per_parameter_state().items()}

    parts = make(dtype)
    optimizer = optimizers.build(config, parts[1])
    state = optimizer.per_parameter_state()
    assert state.keys() == saved.keys()
    for key, array in state.items():
        assert array.shape == saved[key].shape and array.dtype == saved[key].dtype
        array[...] = saved[key]
    for key, parameter in parts[0].items():
        parameter.data[...] = first[key].data
    optimizer.steps = 2
    resumed, _, _ = train(config, dtype, steps=STEPS - 2, optimizer=optimizer, parts=parts, start=3)
    for key, parameter in resumed.items():
        np.testing.assert_array_equal(parameter.data, whole[key].data)


def test_names_and_shapes_of_the_state():
    flat = make(np.float32)[1]
    adam = optimizers.build(CASES["adam"][0], flat).per_parameter_state()
    assert {name: array.shape for name, array in adam.items()} == {
        f"{name}.{key}": shape for name, shape in SHAPES.items() for key in ("m", "v")
    }
    adafactor = optimizers.build(CASES["adafactor"][0], flat).per_parameter_state()
    assert {name: array.shape for name, array in adafactor.items()} == {
        "embedding.rows": (9,),
        "embedding.columns": (4,),
        "weight.rows": (6,),
        "weight.columns": (4,),
        "cube.rows": (2, 3),
        "cube.columns": (2, 5),
        "norm.v": (4,),
        "bias.v": (6,),
    }
    assert optimizers.build(CASES["plain sgd"][0], flat).per_parameter_state() == {}


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("cuts", [[0.3, 0.9], [0.5]])
def test_ranges_together_are_the_whole(name, cuts):
    config, _ = CASES[name]
    whole, _, _ = train(config, np.float32)
    parameters, flat = make(np.float32)
    size = flat.groups[0].size
    borders = [0, *[int(cut * size) for cut in cuts], size]
    owners = [optimizers.build(config, flat, [slice(a, b)]) for a, b in itertools.pairwise(borders)]
    assert sum(array.size for owner in owners for array in owner.parts[0].state.values()) % size == 0
    for step in range(1, STEPS + 1):
        for key, gradient in gradients(step).items():
            parameters[key].buffer[...] = gradient
            parameters[key].grad = parameters[key].buffer
        for owner in owners:
            owner.step(rate(config, step))
    for key, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.data, whole[key].data)


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_ranges_must_not_cut_where_whole_parameters_are_needed(name):
    config, _ = CASES[name]
    _, flat = make(np.float32)
    (group,) = flat.groups
    middle = group.slices["weight"].start
    optimizers.build(config, flat, [slice(0, middle)])
    with pytest.raises(ValueError, match=rf"{name} needs whole parameters.* cuts weight \[6, 4\]"):
        optimizers.build(config, flat, [slice(0, middle + 1)])


def test_lamb_of_a_zero_matrix_takes_the_plain_step():
    parameters, flat = make(np.float64, {"weight": (2, 2)})
    parameters["weight"].data[...] = 0
    parameters["weight"].buffer[...] = 1
    parameters["weight"].grad = parameters["weight"].buffer
    optimizers.build(c.LAMBConfig(learning_rate=0.5, epsilon=1e-12, weight_decay=0.0), flat).step(0.5)
    np.testing.assert_allclose(parameters["weight"].data, -0.5)  # m^ / sqrt(v^) = 1, ratio 1


def test_a_graph_from_before_the_update_is_refused():
    parameters, flat = make(np.float64, {"weight": (2, 2)})
    y = parameters["weight"] * parameters["weight"]
    y.backward(np.ones((2, 2)), retain_graph=True)
    optimizers.build(c.AdamConfig(learning_rate=0.1), flat).step(0.1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward(np.ones((2, 2)))
