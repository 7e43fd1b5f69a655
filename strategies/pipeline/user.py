"""A schedule from the user: a CSV file with a row per rank, or a function as those in `schedules.py`.

    0F0,0F1,,,0B0,0B1          one cell per action, <stage>F|B|I|W<microbatch>; empty cells are pauses of the picture
    1F0,1B0,1F1,1B1,,

This is the form of PyTorch's pipeline schedule CSVs without communication.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from dtrain.strategies.pipeline.schedules import Action, Program, ScheduleError

_CELL = re.compile(r"(\d+)([FBIW])(\d+)")


def from_file(name: str, ranks: int, microbatches: int, chunks: int) -> list[Program]:
    """The programs in FILE.csv, or of the function in FILE.py:FUNCTION; checked for these numbers."""
    path, _, function = name.partition(":")
    if not Path(path).is_file():
        raise ScheduleError(f"schedule {name}: there is no file {path}")
    programs = (
        _from_csv(Path(path)) if path.endswith(".csv") else _from_python(path, function, ranks, microbatches, chunks)
    )
    if len(programs) != ranks:
        raise ScheduleError(f"schedule {name}: for {len(programs)} ranks; here are {ranks}")
    found = 1 + max((action.microbatch for program in programs for action in program), default=-1)
    if found != microbatches:
        raise ScheduleError(f"schedule {name}: has {found} microbatches; asked for: {microbatches}")
    return programs


def to_csv(programs: list[Program]) -> str:
    """The text that `from_file` reads."""
    return "".join(",".join(map(str, program)) + "\n" for program in programs)


def _from_csv(path: Path) -> list[Program]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"{path}: cannot be read as a CSV file in UTF-8: {error}") from None
    programs: list[Program] = []
    for line, row in enumerate(rows, 1):
        program = []
        for column, cell in enumerate(map(str.strip, row), 1):
            match = _CELL.fullmatch(cell)
            if match:
                program.append(Action(int(match[1]), match[2], int(match[3])))
            elif cell:
                raise ScheduleError(f"{path}, line {line}, cell {column}: {cell!r}; must be such as 0F1, 2B0")
        if program:
            programs.append(program)
    return programs


def _from_python(path: str, function: str, ranks: int, microbatches: int, chunks: int) -> list[Program]:
    import runpy

    found = runpy.run_path(path).get(function)
    if not callable(found):
        raise ScheduleError(f"schedule {path}:{function}: no function of this name in the file")
    return [[Action(*action) for action in found(rank, ranks, microbatches, chunks)] for rank in range(ranks)]
