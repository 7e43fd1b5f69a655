"""What a schedule does, message by message, with Python's own sets: the oracle of the prover, for small sizes.

Written from the rules in `schedule.py` alone, with nothing of the prover in it.
"""

from collections import defaultdict
from functools import reduce
from types import SimpleNamespace
from typing import Any

from dtrain.collectives.schedules.schedule import Schedule

Sum = tuple[frozenset[int], Any, bool]  # the contributions, the brackets, whether all were in the order of the ranks


class Wrong(Exception):
    """The schedule is."""


def proven(schedule: Schedule) -> SimpleNamespace:
    """What `prove` finds out; Wrong where it must refuse."""
    spec, size, parts = schedule.specification, schedule.size, schedule.parts
    programs = [schedule.of(rank) for rank in range(size)]
    memory: list[dict[int, Sum]] = [
        {chunk: (frozenset([rank]), rank, True) for chunk in spec.given(rank)} for rank in range(size)
    ]
    counted = SimpleNamespace(steps=0, messages=0, sent=[0] * size, received=[0] * size, added=[0] * size)
    every_sum: list[Sum] = []

    def add(left: Sum, right: Sum) -> Sum:
        if left[0] & right[0] and not spec.promise.idempotent:
            raise Wrong
        ordered = left[2] and right[2] and max(left[0]) < min(right[0])
        every_sum.append((left[0] | right[0], frozenset([left[1], right[1]]), ordered))
        return every_sum[-1]

    for t in range(max(map(len, programs))):
        steps = [program[t] if t < len(program) else None for program in programs]
        flying: dict[tuple[int, int], list[Any]] = defaultdict(list)
        read = set()
        for rank, step in enumerate(steps):
            for send in step.sends if step else ():
                if any(chunk not in memory[rank] for chunk in send.chunks):
                    raise Wrong
                read |= {(rank, chunk) for chunk in send.chunks}
                flying[rank, send.peer].append([(chunk, memory[rank][chunk]) for chunk in send.chunks])
                counted.messages += 1
                counted.sent[rank] += len(send.chunks)
        counted.steps += any(step and (step.sends or step.receives) for step in steps)
        plain: list[tuple[int, int]] = []
        arrivals: dict[tuple[int, int], list[tuple[int, Sum]]] = defaultdict(list)
        for rank, step in enumerate(steps):
            for receive in step.receives if step else ():
                if receive.peer == rank or not flying[receive.peer, rank]:
                    raise Wrong
                message = flying[receive.peer, rank].pop(0)
                if [c % parts for c, _ in message] != [c % parts for c in receive.chunks]:
                    raise Wrong
                counted.received[rank] += len(message)
                for place, (_, content) in zip(receive.chunks, message, strict=True):
                    if not 0 <= place < schedule.places:
                        raise Wrong
                    arrivals[rank, place].append((receive.peer, content))
                    plain += [] if receive.reduce else [(rank, place)]
        if any(flying.values()) or read & set(plain) or any(len(arrivals[cell]) > 1 for cell in plain):
            raise Wrong
        for (rank, place), contents in arrivals.items():
            if (rank, place) in plain:
                memory[rank][place] = contents[0][1]
                continue
            if not spec.reduces or place not in memory[rank]:
                raise Wrong
            addends = sorted([*contents, (rank, memory[rank][place])], key=lambda pair: pair[0])
            memory[rank][place] = reduce(add, (content for _, content in addends))
            counted.added[rank] += len(contents)
        for rank, step in enumerate(steps):
            for fold in step.folds if step else ():
                if any(c % parts != fold.into % parts or c not in memory[rank] for c in fold.chunks):
                    raise Wrong
                memory[rank][fold.into] = reduce(add, (memory[rank][c] for c in fold.chunks))
                counted.added[rank] += len(fold.chunks) - 1
    brackets = defaultdict(set)
    for rank in range(size):
        for chunk in spec.wanted(rank):
            if chunk not in memory[rank] or (spec.reduces and memory[rank][chunk][0] != set(spec.contributors(rank))):
                raise Wrong
            brackets[chunk].add(memory[rank][chunk][1])
    same_for_all = len({spec.contributors(rank) for rank in range(size)}) == 1 and not spec.promise.idempotent
    counted.equal_bits = not same_for_all or all(len(found) == 1 for found in brackets.values())
    counted.ordered = all(ordered for _, _, ordered in every_sum)
    return counted
