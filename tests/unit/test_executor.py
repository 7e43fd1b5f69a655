"""The executor between ranks in one thread, which take turns in any order, beside the interpreter: every algorithm.

Where the pitfalls of message algorithms are tested:

    p = 1-9, 16 x every algorithm; 0, 1, p-1, p, p+1 elements              here
    same cut on all ranks; ranks without elements in uneven variants       here (all_gather, gather, all_to_all)
    messages that leave only when they are awaited: no deadlock            here (`Wire`)
    what is still to be sent is not overwritten; in place                  here; test_in_place_and_overlapping
    bits do not depend on timing or segments; equal on all ranks           here (three orders, two segments)
    aliasing, strides, read-only, 0-d, byte order                          test_forms_of_arrays
    float16 and bfloat16 in float32; one rounding a step                   test_half_precision
    order of the ranks where the algorithm keeps it; buckets               test_sums_by_direct_do_not_depend_on_buckets
    another count, dtype, root or algorithm on one rank                    test_a_call_too_many_is_a_mismatch
    more than one MPI call can carry                                       tests/mpi/test_scheduled.py

Those with a name are in `test_scheduled.py`.
"""

import random
from collections import defaultdict, deque

import ml_dtypes
import numpy as np
import pytest

from dtrain.collectives.schedules import ALGORITHMS, schedule
from dtrain.collectives.schedules.executor import Memory, Run
from dtrain.collectives.schedules.interpreter import interpret
from dtrain.collectives.schedules.planner import make_plan
from tests.schedule_cases import ROOTED, ROWS, given

BLOCKS = ("all_gather", "gather", "all_to_all")
SIZES = [*range(1, 10), 16]
KINDS = [
    ("float64", "sum"),
    ("float32", "sum"),
    ("bfloat16", "sum"),
    ("float16", "prod"),
    ("int16", "min"),
    ("bool", "sum"),
    ("complex64", "prod"),
    ("uint8", "max"),
]


class Wire:
    """Messages that are read from the sender's memory when the receiver takes them; `send` is over then, not before."""

    def __init__(self, size):
        self.size = size
        self.mail = defaultdict(deque)
        self.posted = defaultdict(deque)

    def of(self, rank):
        return Rank(self, rank)


class Rank:
    def __init__(self, wire, rank):
        self.wire, self.rank, self.size = wire, rank, wire.size

    def start_send(self, source, destination, tag):
        letter = Letter(source)
        self.wire.mail[self.rank, destination, tag].append(letter)
        return letter

    def start_recv(self, target, source, tag):
        pair = source, self.rank, tag
        return Slot(self.wire.mail[pair], self.wire.posted[pair], target)


class Letter:
    def __init__(self, source):
        self.source, self.taken = source, False

    def test(self):
        return self.taken


class Slot:
    """Receives get the messages in the order in which they were posted, as in MPI, whatever is asked after first."""

    def __init__(self, queue, posted, target):
        self.queue, self.posted, self.target, self.over = queue, posted, target, False
        posted.append(self)

    def test(self):
        while not self.over and self.queue:
            self.posted.popleft().take(self.queue.popleft())
        return self.over

    def take(self, letter):
        assert letter.source.nbytes == self.target.nbytes, "the two ends cut differently"
        self.target[...] = letter.source
        letter.taken = self.over = True


def drive(plan, inputs, counts, op, segment_bytes, order, in_place=False):
    """All ranks in one thread, taking turns in a random order."""
    wire, dtype = Wire(plan.size), inputs[0].dtype
    lengths = plan.specification.lengths(counts)
    runs, results, memory = [], [], Memory()
    for rank, array in enumerate(inputs):
        ready = make_plan(plan, rank, lengths, dtype.itemsize, in_place, segment_bytes)
        target = array.copy() if in_place else np.empty(ready.lengths[1], dtype)
        runs.append(Run(ready, wire.of(rank), target if in_place else array, target, op, 0, memory))
        results.append(target)
    open_runs, state = list(runs), None
    while open_runs:
        order.shuffle(open_runs)
        open_runs = [run for run in open_runs if not run.test()]
        before, state = state, [(run.done_events, run._posted, len(run._sends)) for run in runs]
        assert state != before, f"deadlock: {[(run.transport.rank, run.where()) for run in open_runs]}"
    assert not any(wire.mail.values()), "messages that nobody received"
    return results


@pytest.mark.parametrize("collective, name", ROWS)
def test_every_algorithm_has_the_bits_of_the_interpreter(collective, name):
    rng, order = np.random.default_rng(1), random.Random(1)
    kinds = 0
    for size in SIZES:
        if not ALGORITHMS[collective][name].sizes(size):
            continue
        root = {0: 0, 1: size - 1, 2: size // 2}[size % 3] if collective in ROOTED else 0
        plan = schedule(collective, name, size, root=root)
        reduces = plan.specification.reduces
        alike = collective in ("all_reduce", "scan")  # and so may work in place
        for count in sorted({0, 1, size - 1, size, size + 1, 61}):
            word, op = KINDS[kinds % len(KINDS)] if reduces else (KINDS[kinds % len(KINDS)][0], "")
            kinds += 1
            dtype = np.dtype(getattr(ml_dtypes, word, word))
            inputs, counts = given(plan, count if collective not in BLOCKS else -(-count // 4), rng, dtype)
            kept = [array.copy() for array in inputs]
            expected = interpret(plan, inputs, op or "sum", counts)
            ways = [(1 << 18, alike)] if count < size + 2 else [(1 << 18, False), (max(8, count), alike)]
            for segment_bytes, in_place in ways:
                found = drive(plan, inputs, counts, op, segment_bytes, order, in_place)
                for rank, (a, b) in enumerate(zip(found, expected, strict=True)):
                    if len(b) or collective != "exscan":
                        assert a.tobytes() == b.tobytes(), f"{size} ranks, {count} of {dtype}, rank {rank}: {a}, {b}"
            assert all(a.tobytes() == b.tobytes() for a, b in zip(inputs, kept, strict=True)), "the input was changed"
