"""A loss that is no number is told with the rank, the module and the op in which it began."""

import numpy as np
import pytest

from dtrain.collectives import Communicator, run_threads, single
from dtrain.errors import UserError
from dtrain.modules import Module
from dtrain.tape import tracing
from dtrain.tensor import Tensor
from tests import training


def fails(comm: Communicator, rank: int, name: str, value: float, parallel: dict[str, object] | None = None) -> str:
    trainer = training.trainer(comm, train={"micro_batch": 2}, parallel=parallel or {})
    parameters = trainer.model.named_parameters()
    trainer.train_step()
    for parameter in [each for path, each in parameters.items() if path.startswith(name) and comm.rank == rank]:
        parameter.data[...] = value
    with pytest.raises(UserError) as caught:
        trainer.train_step()
    return str(caught.value)


def test_an_op_that_overflows() -> None:
    with np.errstate(all="ignore"):
        said = fails(single(), 0, "blocks.1.mlp.down.weight", 1e308)
    assert "the loss of step 2 is " in said
    assert "; it began on rank 0: linear in blocks.1.mlp, whose inputs are finite, up to 1e+308. Lower" in said


def test_a_parameter_that_is_no_number() -> None:
    said = fails(single(), 0, "blocks.0.mlp.up.weight", np.nan)
    assert " in blocks.0.mlp" in said and "whose inputs are inf or nan already" in said


@pytest.mark.parametrize("parallel", [{"dp": 2}, {"pp": 2}, {"tp": 2}])
def test_the_rank_is_named(parallel: dict[str, object]) -> None:
    """Of two stages the second has the block, and the first computed well."""
    name = "blocks.1.attention"
    said = run_threads(2, fails, 1, name, np.nan, parallel)
    assert said[0] == said[1]
    assert "; it began on rank 1: " in said[0] and " in blocks.1.attention" in said[0]


def test_modules_that_share_a_name() -> None:
    """A block that is gathered when it is needed is a module in a module of its name; it is named once."""

    class Around(Module):
        def __init__(self, name: str, inside: Module | None) -> None:
            self.name, self.inside = name, inside

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.inside is None else self.inside(x)

    block = Around("blocks.0", Around("blocks.0", Around("blocks.0.mlp", Around("blocks.0.mlp.up", None))))
    with tracing():
        made = block(Tensor(np.ones(3), requires_grad=True)).node
    assert made is not None and made.scope == "blocks.0.mlp.up"
