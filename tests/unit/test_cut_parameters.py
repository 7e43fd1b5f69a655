"""Parameters that a strategy cuts: initial values, gradient sums, norm, optimizers and checkpoints follow from layouts.

The strategy here is a small one made for the test: the MLP of each block over the tp axis, the norm before it inside of
what is done in parts. Ranks are threads; one process without a strategy is the reference.
"""

import numpy as np
import pytest

import dtrain.functional as F
from dtrain import conjugate, models
from dtrain.collectives import run_threads, single
from dtrain.data import data_of
from dtrain.flat import FlatBuffers, reduce_partial
from dtrain.layout import Layout, Only, Partial, Shard
from dtrain.mesh import Mesh
from dtrain.models.blocks import MLP
from dtrain.optimizers import global_norm
from dtrain.parameter import Constant, Normal, Parameter
from dtrain.strategies import DistributedDataParallel, NaiveDataParallel
from dtrain.strategy import Strategy
from dtrain.trainer import Trainer
from tests import training

OPTIMIZERS = {
    "sgd": {"kind": "sgd", "learning_rate": 0.1},
    "adam": {"kind": "adam", "learning_rate": 3e-3, "weight_decay": 0.1},
    "adamw": {"kind": "adamw", "learning_rate": 3e-3, "clip_norm": 0.5},
    "lamb": {"kind": "lamb", "learning_rate": 3e-3},
    "adafactor": {"kind": "adafactor", "learning_rate": 3e-3, "weight_decay": 0.1, "clip_norm": 0.5},
}


class ParallelMLP(MLP):
    """An MLP of which this rank has some of the hidden units."""

    def __init__(self, mlp, norm, comm):
        vars(self).update(vars(mlp))
        self.norm, self.comm = norm, comm

    def forward(self, x, residual, context=None):
        inner = F.gelu(self.up.product(self.norm(conjugate.copy(x, self.comm))), self.up.bias, approximate=True)
        return F.bias_residual(conjugate.all_reduce(self.down.product(inner), self.comm), self.down.bias, residual)


class Identity(MLP):
    def __init__(self):
        pass

    def forward(self, x):
        return x


class MLPParallel(Strategy):
    axis = "tp"

    def apply(self, model, mesh):
        for block in model.blocks:
            mlp, norm = block.mlp, block.norm2
            # hidden units in two runs each, as q, k and v rows would be
            hidden, size = mlp.up.weight.whole[0], mesh.size("tp")
            starts = [round(i * hidden / (2 * size)) for i in range(2 * size + 1)]
            runs = tuple(((starts[i], starts[i + 1]), (starts[i + size], starts[i + size + 1])) for i in range(size))
            mlp.up.weight.cut(mesh, Layout(tp=Shard(0, runs)))
            mlp.up.bias.cut(mesh, Layout(tp=Shard(0, runs)))
            mlp.down.weight.cut(mesh, Layout(tp=Shard(1, runs)))
            for parameter in norm.named_parameters().values():
                parameter.gradient_layout = Layout(tp=Partial())
            block.mlp = ParallelMLP(mlp, norm, mesh["tp"])
            block.norm2 = Identity()
        return model


def make(comm, sections, data_parallel=DistributedDataParallel, **mesh):
    config = training.config(**sections)
    mesh = Mesh(comm, **mesh)
    data = data_of(config)
    strategies = [MLPParallel()] if mesh.size("tp") > 1 else []
    strategies += [data_parallel()] if mesh.size("dp") > 1 else []
    return Trainer(config, mesh, data, models.outline(config.model, data, "float64"), strategies)


def sections(optimizer, steps=4):
    return {
        "optimizer": OPTIMIZERS[optimizer],
        "train": {"steps": steps, "global_batch": 4, "micro_batch": 1, "dtype": "float64"},
        "model": {"kind": "gpt", "layers": 2, "dim": 16, "heads": 2, "sequence": 8, "hidden": 22},
    }


def trained(comm, given, **options):
    trainer = make(comm, given, **options)
    losses = training.losses(list(trainer.run()))
    return losses, pieces(trainer)


def pieces(trainer):
    """By name: [(start, array)] of what this rank owns: parameters and state."""
    found = {}
    for blocks in trainer._blocks().values():
        for block in blocks:
            found.setdefault(block.name, []).append((block.start, block.array.copy()))
    return found


def check(results, reference):
    expected_losses, whole = reference
    covered = {name: np.zeros(arrays[0][1].shape, bool) for name, arrays in whole.items()}
    for losses, mine in results:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
        for name, blocks in mine.items():
            for start, array in blocks:
                where = tuple(slice(a, a + n) for a, n in zip(start, array.shape, strict=True))
                covered[name][where] = True
                np.testing.assert_allclose(array, whole[name][0][1][where], rtol=1e-7, atol=1e-10, err_msg=name)
    assert all(each.all() for each in covered.values())
    assert set(covered) == {name for _, mine in results for name in mine}


CASES = [
    *((optimizer, 3, {"tp": 3}) for optimizer in OPTIMIZERS),
    *((optimizer, 4, {"tp": 2, "dp": 2}) for optimizer in ("lamb", "adafactor", "adamw")),
    ("adamw", 4, {"tp": 2, "dp": 2, "order": "dp-tp-cp-ep-pp", "data_parallel": NaiveDataParallel}),
    ("adamw", 8, {"tp": 8}),
    ("lamb", 8, {"tp": 2, "dp": 4}),
]


@pytest.mark.parametrize(("optimizer", "size", "options"), CASES)
def test_losses_norms_parameters_and_state_equal_one_process(optimizer, size, options):
    given = sections(optimizer)
    check(run_threads(size, lambda comm: trained(comm, given, **options)), trained(single(), given))


def test_any_layout_reads_what_any_other_wrote(tmp_path):
    optimizer, layouts = "adafactor", [(1, {}), (3, {"tp": 3}), (4, {"tp": 2, "dp": 2})]
    reference = trained(single(), sections(optimizer))

    def first_half(comm, folder, sizes):
        trainer = make(comm, sections(optimizer), **sizes)
        for _ in range(2):
            trainer.train_step()
        return str(trainer.save(folder))

    def second_half(comm, folder, sizes):
        trainer = make(comm, sections(optimizer), **sizes)
        trainer.load(folder)
        losses = training.losses(list(trainer.run()))
        return np.concatenate([reference[0][:2], losses]), pieces(trainer)

    for (size, sizes), (other, other_sizes) in zip(layouts, layouts[1:] + layouts[:1], strict=True):
        folder, *_ = run_threads(size, first_half, tmp_path / f"{size}", sizes)
        check(run_threads(other, second_half, folder, other_sizes), reference)


def parameter(name, shape, initial=None):
    made = Parameter(shape, initial or Normal(1.0), np.float64)
    made.name = name
    return made


@pytest.mark.parametrize("layout", [Layout(tp=Shard(0)), Layout(dp=Shard(1), tp=Shard(1)), Layout(tp=Shard(2))])
def test_initial_values_are_slices_of_the_whole(layout):
    whole = parameter("w", (5, 4, 3)).initial_values(7)

    def on_rank(comm):
        mesh = Mesh(comm, dp=2, tp=3)
        drawn, kept = parameter("w", (5, 4, 3)), parameter("w", (5, 4, 3))
        drawn.cut(mesh, layout)
        flat = FlatBuffers({"w": drawn}, single(), mesh=mesh)
        flat.initialise(7)
        kept.data = whole.copy()
        kept.cut(mesh, layout)
        expected = whole[layout.part(mesh, whole.shape)]
        np.testing.assert_array_equal(drawn.data, expected)
        np.testing.assert_array_equal(kept.data, expected)
        assert drawn.whole == (5, 4, 3) and drawn.shape == layout.local_shape(mesh, (5, 4, 3))
        with pytest.raises(ValueError, match="is cut already"):
            drawn.cut(mesh, layout)
        axes = iter(layout.axes(Shard))
        again = parameter("w", (5, 4, 3))
        for axis in axes:  # without values, one axis after the other
            again.cut(mesh, again.layout.with_(**{axis: layout[axis]}))
        assert again.boxes == drawn.boxes and again.shape == drawn.shape

    run_threads(6, on_rank)


def test_a_parameter_is_not_a_sum():
    with pytest.raises(ValueError, match="a parameter is not a sum"):
        parameter("w", (2, 2)).cut(Mesh(single()), Layout(tp=Partial()))


def test_the_norm_counts_everything_once():
    """Replicated, cut, on some stages only, tied between stages with partial gradients: one number, on all ranks."""
    shapes = {"cut": (5, 3), "same": (4,), "first": (3, 2), "tied": (6,), "partial": (2, 2)}
    gradients = {name: np.random.default_rng(len(name)).standard_normal(shape) for name, shape in shapes.items()}
    expected = np.sqrt(sum(np.square(each).sum() for each in gradients.values()))

    def on_rank(comm):
        mesh = Mesh(comm, pp=3, dp=2, tp=2)
        stage = mesh.coordinates["pp"]
        held = {name: parameter(name, shape, Constant(1.0)) for name, shape in shapes.items()}
        held["cut"].cut(mesh, Layout(tp=Shard(0)))
        held["first"].cut(mesh, Layout(pp=Only((0,)), tp=Shard(1)))
        held["tied"].cut(mesh, Layout(pp=Only((0, 2))))
        held["tied"].gradient_layout = Layout(pp=Partial())
        held["partial"].gradient_layout = Layout(tp=Partial())
        held = {name: each for name, each in held.items() if each.layout.holds(mesh)}
        flat = FlatBuffers(held, single(), mesh=mesh)
        for name, each in held.items():
            each.grad = each.buffer
            share = {"tied": 0.25 if stage == 0 else 0.75, "partial": [0.4, 0.6][mesh.coordinates["tp"]]}.get(name, 1)
            each.grad[...] = gradients[name][each.layout.part(mesh, each.whole)] * share
        reduce_partial(flat)
        for name, each in held.items():
            part = gradients[name][each.layout.part(mesh, each.whole)]
            np.testing.assert_allclose(each.grad, part, rtol=1e-14, err_msg=name)
        return global_norm(flat)

    norms = run_threads(12, on_rank)
    assert norms == pytest.approx([expected] * 12, rel=1e-14) and len(set(norms)) == 1
