"""Run a schedule on NumPy arrays for all ranks at once, in one process: what the executors are compared with.

    results = interpret(schedule("all_reduce", "ring", 3), [a0, a1, a2])

Plain and slow on purpose: every place of every rank is an array of its own, every step does exactly what `schedule.py`
says. A sum is rounded to the arrays' dtype once per step, as on a wire between ranks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.collectives.dtypes import Array, accumulator, operation, starts
from dtrain.collectives.schedules.schedule import Schedule

Memory = dict[int, Array]  # place -> content


def interpret(
    schedule: Schedule, arrays: Sequence[Array], op: str = "sum", counts: int | Sequence[int] | Array | None = None
) -> list[Array]:
    """The result of every rank: its wanted chunks, concatenated (length 0 where it wants none).

    arrays: per rank its given chunks as a 1-D array (length 0 where it has none). counts: see
    `Specification.lengths`; by default the length of the vector as the longest array has it.
    """
    spec = schedule.specification
    lengths = spec.lengths(default_counts(schedule, arrays) if counts is None else counts)
    memories = [load(schedule, rank, array, lengths) for rank, array in enumerate(arrays)]
    programs = [schedule.of(rank) for rank in range(schedule.size)]
    with np.errstate(all="ignore"):
        for step in range(max(map(len, programs))):
            _step(schedule, [program[step] if step < len(program) else None for program in programs], memories, op)
    return [unload(schedule, rank, memory, arrays[rank].dtype) for rank, memory in enumerate(memories)]


def default_counts(schedule: Schedule, arrays: Sequence[Array]) -> Any:
    """What `Specification.lengths` wants, where the arrays say it."""
    if schedule.collective in ("all_gather", "gather"):
        return [len(array) for array in arrays]
    return max(len(array) for array in arrays)


def load(schedule: Schedule, rank: int, array: Array, lengths: Array) -> Memory:
    """The places of a rank before the first step: copies of its input."""
    given = schedule.specification.given(rank)
    counts = [int(lengths[chunk]) for chunk in given]
    if len(array) != sum(counts):
        raise ValueError(f"{schedule.collective}: rank {rank}: {len(array)} elements given, {sum(counts)} expected")
    return {
        chunk: array[start : start + count].copy()
        for chunk, start, count in zip(given, starts(counts), counts, strict=True)
    }


def unload(schedule: Schedule, rank: int, memory: Memory, dtype: np.dtype[Any]) -> Array:
    """The result of a rank."""
    wanted = [memory[chunk] for chunk in schedule.specification.wanted(rank)]
    return np.concatenate([np.empty(0, dtype), *wanted])


def fold(parts: Sequence[Array], op: str) -> Array:
    """parts[0] op parts[1] op ... from the left; small floats are added in float32 and rounded once."""
    ufunc, dtype = operation(op, parts[0].dtype), parts[0].dtype
    wide = accumulator(dtype)
    total = parts[0].astype(wide)
    for part in parts[1:]:
        total = ufunc(total, part.astype(wide))
    return np.asarray(total).astype(dtype)


def _step(schedule: Schedule, steps: Sequence[Any], memories: Sequence[Memory], op: str) -> None:
    wires: dict[tuple[int, int], list[list[Array]]] = {}
    for rank, step in enumerate(steps):
        for send in step.sends if step else ():
            content = [memories[rank][chunk].copy() for chunk in send.chunks]
            wires.setdefault((rank, send.peer), []).append(content)
    for rank, step in enumerate(steps):
        if step is None:
            continue
        arrivals: dict[int, list[tuple[int, Array]]] = {}
        for receive in step.receives:
            message = wires[receive.peer, rank].pop(0)
            for chunk, arrived in zip(receive.chunks, message, strict=True):
                if receive.reduce:
                    arrivals.setdefault(chunk, []).append((receive.peer, arrived))
                else:
                    memories[rank][chunk] = arrived
        for chunk, values in arrivals.items():
            values.append((rank, memories[rank][chunk]))
            memories[rank][chunk] = fold([value for _, value in sorted(values, key=lambda pair: pair[0])], op)
        for local in step.folds:
            memories[rank][local.into] = fold([memories[rank][chunk] for chunk in local.chunks], op)
    left = [pair for pair, messages in wires.items() if messages]
    if left:
        raise ValueError(f"{schedule.collective} {schedule.name}: messages that nobody received: {left}")
