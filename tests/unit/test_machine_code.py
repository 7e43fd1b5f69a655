"""Sums, copies and waits in machine code: the bits of NumPy, at every length and place; no wake-up is lost."""

import threading
import time

import numpy as np
import pytest

from dtrain.collectives import copying, parts, sums
from dtrain.collectives.dtypes import address
from dtrain.collectives.machine_code import crew_words, machine_code

code = machine_code()
pytestmark = pytest.mark.skipif(code is None, reason="no llvmlite, or DTRAIN_MACHINE_CODE=off")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("skip", [0, 5])
def test_sums_have_the_bits_of_numpy(monkeypatch, dtype, ranks, skip):
    monkeypatch.setattr(sums, "FEW", 1)
    monkeypatch.setattr(sums, "last_level_cache", lambda: 100_000)  # the longer ones go past it
    for count in (1, 63, 64, 127, 1000, 20_001):
        rng = np.random.default_rng(count)
        parts = [rng.standard_normal(count + skip + 3).astype(dtype) for _ in range(ranks)]
        whole = parts[0][skip : skip + count].copy()
        for part in parts[1:]:
            whole += part[skip : skip + count]
        room = np.full(2 * (count + 200), 7, dtype)
        start = -address(room) % 64 // room.itemsize
        results = [room[start : start + count], room[start + count + 50 : start + 2 * count + 50]]
        sum_ = sums.Sum(np.add, parts, skip, skip + count)
        assert sum_._add is not None
        for chosen in ([results[0]], results):
            room[:] = 7
            sum_.into(chosen)
            assert all(result.tobytes() == whole.tobytes() for result in chosen)
            assert np.count_nonzero(room != 7) <= len(chosen) * count, "written beside the result"
        before = [part.copy() for part in parts]
        sum_.in_place()
        for part, old in zip(parts, before, strict=True):
            assert part[skip : skip + count].tobytes() == whole.tobytes()
            assert part[:skip].tobytes() == old[:skip].tobytes()
            assert part[skip + count :].tobytes() == old[skip + count :].tobytes()


def test_other_operations_and_dtypes_are_numpys():
    for ufunc, dtype in ((np.maximum, "float32"), (np.add, "int32"), (np.add, "float16"), (np.add, ">f4")):
        parts = [np.full(sums.FEW, 1, dtype), np.full(sums.FEW, 2, dtype)]
        assert sums.Sum(ufunc, parts, 0, sums.FEW)._add is None


@pytest.mark.parametrize("nbytes", [0, 100, 1 << 16, (1 << 16) + 77])
@pytest.mark.parametrize("distance", [0, 1, 64, 100])
def test_copies_past_the_caches(nbytes, distance):
    room = np.zeros(1 << 19, np.uint8)
    source = room[33 : 33 + nbytes]
    source[...] = np.random.default_rng(nbytes).integers(1, 256, nbytes)
    begin = (1 << 18) + distance
    target = room[begin : begin + nbytes]
    copying.copy(target, source, past=True)
    assert target.tobytes() == source.tobytes()
    assert not room[begin + nbytes : begin + nbytes + 64].any()
    assert not room[begin - 64 : begin].any()


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 1000, 70_001])
def test_swaps(monkeypatch, nbytes):
    """Rows of machine code and of its twin: two arrays change places, byte for byte, and nothing beside them."""
    monkeypatch.setattr(copying, "_PIECE", 20_000)
    random = np.random.default_rng(nbytes).integers(0, 256, (2, 80_000)).astype(np.uint8)
    for fused in (True, False):
        here, there = random.copy()
        rows = [(address(there), 5, 33, nbytes), (address(there), 79_000, 78_000, 333)]
        part = parts.swaps(rows)
        if fused:
            table = part.tables[0]
            job = np.array([code.parts["swaps"], address(table), len(table), address(here), 0, 0, 0], np.int64)
            code.do(address(job), 0)
        else:
            part.python(there, here)
        expected = random.copy()
        for _, begin, to, length in rows:
            expected[0, to : to + length] = random[1, begin : begin + length]
            expected[1, begin : begin + length] = random[0, to : to + length]
        assert np.array_equal(here, expected[0])
        assert np.array_equal(there, expected[1])


class Ranks:
    """Flags, signatures and a bell of some ranks, as `flags.py` has them."""

    def __init__(self, size: int, tries: tuple[int, int]) -> None:
        self.words = np.zeros((size, 16), np.int64)
        self.bell = np.zeros(2, np.int64)
        self.crews = []
        for rank in range(size):
            others = [address(row) for other, row in enumerate(self.words) if other != rank]
            self.crews.append(np.array(crew_words(others, address(self.bell), *tries), np.int64))

    def put(self, rank, number):
        code.raise_flag(address(self.crews[rank]), address(self.words[rank]), 0, number)

    def wait(self, rank, number, nanoseconds, slot=0, signature=0):
        return code.await_flags(address(self.crews[rank]), 0, number, slot, signature, nanoseconds)


waiting = pytest.mark.skipif(code is None or code.await_flags is None, reason="no futex here")


@waiting
def test_waits_tell_who_is_missing_or_other():
    ranks = Ranks(3, (10, 2))
    ranks.put(0, 1)
    ranks.put(1, 1)
    assert ranks.wait(0, 1, 0) == -1
    assert ranks.wait(0, 1, 1_000_000) == -1
    ranks.put(2, 4)
    assert ranks.wait(0, 1, 1_000_000) == 0
    ranks.words[:, 8] = 5
    assert ranks.wait(0, 1, 0, 64, 5) == 0
    ranks.words[2, 8] = 6
    assert ranks.wait(0, 1, 0, 64, 5) == 2, "the second of the others"
    assert ranks.bell[1] == 0, "nobody is counted as asleep"


@waiting
@pytest.mark.parametrize("tries", [(0, 0), (5, 5)])
def test_no_wake_up_is_lost(tries):
    """Threads meet again and again, sometimes two numbers at once; a lost one would sleep out its minute."""
    ranks, rounds = Ranks(3, tries), 2000

    def run(rank):
        for number in range(1, rounds + 1):
            if number % 7 == 0 and rank == number % 3:
                continue  # is passed over: the next one is raised in its place
            ranks.put(rank, number)
            while number % 7 and ranks.wait(rank, number, 60_000_000_000) != 0:
                pass  # woken for another number

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 50
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), ranks.words[:, 0]
