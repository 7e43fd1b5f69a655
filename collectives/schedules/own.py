"""A user's own algorithm out of a Python file: `examples/my_collective.py:ROW`, for the command line.

PATH.py:NAME       NAME: a function (rank, size, …) -> steps, with as many chunks as ranks; or a row (`Algorithm`)
"""

import importlib.util
import sys
from pathlib import Path

from dtrain.collectives.schedules.schedule import Algorithm, Cost, Steps, bind
from dtrain.collectives.schedules.specification import PROMISES


def is_own(text: str) -> bool:
    """Whether this names a file instead of an algorithm of the catalogue."""
    return text.partition(":")[0].endswith(".py")


def load(text: str) -> Algorithm | Steps:
    """What NAME is in the file; ValueError if there is no such file, or it has no such algorithm. Runs the file."""
    path, _, name = text.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"{text}: {path}: no such file; allowed: PATH.py:NAME")
    module_name = f"dtrain_own_{Path(path).stem}"
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # dataclasses and pickles look there
    found.loader.exec_module(module)
    own = getattr(module, name, None)
    if not (isinstance(own, Algorithm) or callable(own)):
        here = [key for key, value in vars(module).items() if isinstance(value, Algorithm)]
        rows = f"; rows there: {', '.join(here)}" if here else ""
        raise ValueError(f"{text}: {name!r} is no algorithm; allowed: a function (rank, size) -> steps or a row{rows}")
    return own


def load_row(collective: str, text: str) -> Algorithm:
    """The row of a file; of a bare function one with as many chunks as ranks, whose cost is what the prover counts."""
    if collective not in PROMISES:
        raise ValueError(f"{collective}: not a collective; allowed: {', '.join(PROMISES)}")
    own = load(text)
    if isinstance(own, Algorithm):
        return own
    blocks = PROMISES[collective].blocks or PROMISES[collective].pairs

    def counted(size: int) -> Cost:
        from dtrain.collectives.schedules.prover import prove

        return Cost(prove(bind(collective, text, own, size)).steps)

    return Algorithm(own, counted, parts=lambda size: 1 if blocks else size)
