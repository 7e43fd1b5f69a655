"""The measured table: what is read, what is refused, and what a communicator takes from it."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import cache
from dtrain.collectives import Communicator, model, run_threads, tuning
from dtrain.collectives.call import Call
from dtrain.collectives.tuning import Measured, Table, Tuning
from dtrain.launch import bench_tune

KEY = {"mpi": "MPI 1", "processor": "abacus", "dtrain": "0"}


def measured(collective: str = "all_reduce", nbytes: int = 65536, ranks: int = 4, **times: float) -> Measured:
    times = times or {"native": 20.0, "exchange": 10.0}
    return Measured(collective, ranks, 1, "private", nbytes, times, tuple(sorted(times, key=lambda name: times[name])))


def table(*rows: Measured) -> Table:
    return Table.of(KEY, rows or (measured(),))


def call(comm: Communicator, nbytes: int, **words: Any) -> Call:
    array = np.zeros(nbytes // 4, np.float32)
    return Call(comm.transport, None, array, array, "sum", **words)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_from_its_file_and_from_rank_0():
    told = table(measured(), measured("broadcast", ranks=2, native=3.5))
    assert tuning.parse(told.as_json(), KEY) == told
    told = dataclasses.replace(told, source="a folder/with blanks.json")
    assert tuning.unpack(tuning.pack(told)) == told
    assert tuning.unpack(tuning.pack(None)) is None
    assert "a folder/with blanks.json: 2 lengths measured for groups of 2, 4 ranks" in told.describe()


def damaged(**words: Any) -> str:
    content = json.loads(table().as_json())
    content["measured"][0] |= words
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        (table().as_json()[:100], "no JSON"),
        ("[1]", "no tuning table of format 1"),
        (table().as_json().replace('"format": 1', '"format": 2'), "no tuning table of format 1"),
        (table().as_json().replace("abacus", "slide rule"), "measured for .*slide rule.*, this is .*abacus"),
        (json.dumps({"format": 1, "key": KEY, "measured": 3}), "must be lists"),
        (damaged(ranks=0), r"measured\[0\].ranks=0"),
        (damaged(ranks=True), r"measured\[0\].ranks=True"),
        (damaged(nbytes=1.5), r"measured\[0\].nbytes=1.5"),
        (damaged(place="moon"), r"measured\[0\].*moon"),
        (damaged(times={"native": "fast"}), "microseconds"),
        (damaged(times={"native": math.nan}), "microseconds"),
        (damaged(order=["native"]), "each once"),
        (damaged(extra=1), "must have the keys"),
        (table().as_json().replace('"alpha": ', '"alpha": -1, "was": '), r"costs\[0\]"),
    ],
)
def test_what_is_damaged_or_foreign_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        tuning.parse(text, KEY)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file for this machine, in a cache folder of its own."""
    monkeypatch.delenv("DTRAIN_TUNING", raising=False)
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path))
    return tuning.path(tuning.key("MPI 1", "0"))


def find() -> Table | None:
    return tuning.find(lambda: "MPI 1", "0")


def test_the_file_in_the_cache_folder(place, monkeypatch):
    assert tuning.folder() == cache.cache_folder() / "tuning" == place.parent
    never: Any = None  # without a folder not even the library is asked
    assert tuning.find(never, "0") is None
    place.parent.mkdir()
    assert find() is None
    here = Table.of(tuning.key("MPI 1", "0"), [measured()])
    place.write_text(here.as_json())
    found = find()
    assert found is not None and found.measured == here.measured and found.source == str(place)
    assert tuning.find(lambda: "MPI 2", "0") is None and tuning.find(lambda: "MPI 1", "1") is None
    monkeypatch.setenv("DTRAIN_TUNING", "off")
    assert find() is None


def test_the_rule_of_the_folder_is_that_of_the_cache(monkeypatch):
    for word, value in (("DTRAIN_CACHE", "~/there"), ("XDG_CACHE_HOME", "/some/where"), ("HOME", "/home/nobody")):
        monkeypatch.setenv(word, value)
        assert tuning.folder() == cache.cache_folder() / "tuning"
        monkeypatch.delenv(word)


def test_a_damaged_file_is_ignored_with_one_warning(place, tmp_path, monkeypatch):
    place.parent.mkdir()
    place.write_text("{")
    with pytest.warns(UserWarning, match="is ignored: no JSON.*bench tune") as caught:
        assert find() is None
    assert len(caught) == 1
    elsewhere = tmp_path / "mine.json"
    monkeypatch.setenv("DTRAIN_TUNING", str(elsewhere))
    with pytest.warns(UserWarning, match="no such file"):
        assert find() is None
    elsewhere.write_text(table().as_json())
    with pytest.warns(UserWarning, match="measured for .*abacus"):
        assert find() is None
    elsewhere.write_text(Table.of(tuning.key("MPI 1", "0"), [measured()]).as_json())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find() is not None


# --- the choice -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_best_that_is_possible():
    def rank(comm: Communicator) -> list[str]:
        unknown = {"unknown": 1.0, "ring:color=4": 1.5}
        rows = [
            measured("all_reduce", 1 << 16, **unknown, staged=2.0, exchange=10.0, native=20.0),
            measured("broadcast", 1 << 12, **{"chain:segments=2": 1.0, "native": 2.0}),
            measured("all_gather", 1 << 16, native=5.0, staged=1.0),
        ]
        comm.tune(table(*rows))
        ran = []
        for length in (1 << 14, 1 << 10):
            comm.all_reduce(np.ones(length, np.float32))
            ran.append(comm.last.algorithm)
        comm.all_gather(np.ones(1 << 12, np.float32))
        ran.append(comm.last.algorithm)
        comm.gather(np.ones(1 << 14, np.float32))  # not measured
        ran.append(comm.last.algorithm)
        comm.broadcast(np.ones(1 << 10, np.float32))
        ran.append(comm.last.algorithm)
        comm.all_reduce(np.ones(1 << 14, np.float32), algorithm="native")
        ran.append(comm.last.algorithm)
        pair = comm.split(comm.rank // 2)
        pair.all_reduce(np.ones(1 << 14, np.float32))  # not measured for two ranks
        ran.append(pair.last.algorithm)
        return ran

    # neither names that this version does not have nor the staging, which threads have not, are taken
    names = ["exchange", "exchange", "native", "native", "chain", "native", "native"]
    assert run_threads(4, rank) == [names] * 4


def test_what_is_started_goes_by_the_table_too():
    def rank(comm: Communicator) -> list[str]:
        rows = [
            measured("all_reduce", 1 << 16, exchange=1.0, **{"ring:segment_bytes=4096": 2.0, "native": 3.0}),
            measured("all_gather", 1 << 16, staged=1.0, native=2.0, ring=3.0),
        ]
        ran = []
        for known in (table(*rows), None):
            comm.tune(known)
            work = comm.all_reduce_async(np.full(1 << 14, comm.rank, np.float32))
            ran.append(comm.last.algorithm)
            assert (work.wait() == 6).all()
            work = comm.all_gather_async(np.full(1 << 12, comm.rank, np.float32))
            ran.append(comm.last.algorithm)
            assert np.array_equal(work.wait(), np.repeat(np.arange(4, dtype=np.float32), 1 << 12))
        return ran

    # `exchange` and the staging cannot be started without waiting
    assert run_threads(4, rank) == [["ring", "native", "native", "native"]] * 4


def test_the_nearest_length_counts_and_the_costs_beyond():
    rows = [measured(nbytes=1 << bits, a=best, b=3.0) for bits, best in ((10, 1.0), (14, 5.0), (18, 1.0))]

    def orders(comm: Communicator) -> list[str]:
        found = Tuning(table(*rows), [0] * comm.size)
        return ["".join(found.order("all_reduce", call(comm, 1 << bits))) for bits in (9, 10, 12, 14, 15, 16, 17, 18)]

    assert run_threads(4, orders)[0] == ["ab", "ab", "ab", "ba", "ba", "ba", "ab", "ab"]

    def far(comm: Communicator) -> tuple[str, ...]:
        found = Tuning(table(*(measured(nbytes=n, a=10 + n / 100, b=100 + n / 200) for n in (1024, 4096))), [0] * 4)
        return found.order("all_reduce", call(comm, 1 << 20)), found.order("all_reduce", call(comm, 1 << 12))

    assert run_threads(4, far)[0] == (("b", "a"), ("a", "b"))  # the lines cross at 18,000 bytes


def test_where_the_arrays_lie_is_part_of_the_question():
    rows = [dataclasses.replace(measured(a=1.0, b=2.0), place=place) for place in tuning.PLACES]
    rows = [
        dataclasses.replace(row, order=order) for row, order in zip(rows, (("a", "b"), ("b", "a"), ()), strict=True)
    ]

    def orders(comm: Communicator) -> list[tuple[str, ...]]:
        found = Tuning(table(*rows), [0] * 4)
        cases: list[dict[str, Any]] = [{"place": (0, 0), "in_place": True}, {"place": (0, 0)}, {}]
        return [found.order("all_reduce", call(comm, 1 << 16, **words)) for words in cases]

    assert run_threads(4, orders)[0] == [("a", "b"), ("b", "a"), ()]


def test_what_ranks_do_not_know_of_one_another_decides_nothing():
    def uneven(comm: Communicator) -> tuple[str, ...]:
        found = Tuning(table(measured("all_to_all", native=1.0, staged=2.0)), [0] * 4)
        return found.order("all_to_all", call(comm, 1 << 16)) + found.order("barrier", call(comm, 0))

    assert run_threads(4, uneven)[0] == ()


def test_the_built_in_choice_stays_where_nothing_is_clearly_faster():
    times = {"a": 10.0, "b": 10.4, "c": 30.0}
    assert bench_tune.order(times, "b") == ("b", "a", "c")
    assert bench_tune.order(times, "c") == ("a", "b", "c")
    assert bench_tune.order(times, "gone") == ("a", "b", "c")


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_constants_of_messages_are_found_from_all_algorithms_together():
    """Times made by α, β, γ and the formulas of the catalogue give them back, and with them numbers never measured."""
    from dtrain.collectives.schedules.catalogue import schedule

    alpha, beta, gamma = 30e-6, 8e-9, 0.2e-9

    def seconds(algorithm: str, ranks: int, nbytes: int) -> float:
        return schedule("all_reduce", algorithm, ranks).cost.seconds(nbytes, alpha, beta, gamma)

    names = ("ring", "recursive_doubling", "rabenseifner")
    samples: list[model.Sample] = [
        ("all_reduce", ranks, 2, "private", nbytes, name, seconds(name, ranks, nbytes))
        for ranks in (4, 8)
        for nbytes in (1 << 10, 1 << 16, 1 << 22)
        for name in names
    ]
    samples.append(("all_reduce", 8, 2, "private", 1 << 10, "native", 1.0))
    costs = model.fit(samples)
    assert costs.fitted[(True, "private"), "", model.MESSAGES] == pytest.approx((alpha, beta, gamma), rel=1e-6)
    for nbytes in (64, 1 << 13, 1 << 25):
        expected = sorted(names, key=lambda name: seconds(name, 12, nbytes))
        found = costs.order("all_reduce", 12, 3, "private", nbytes)
        assert [name for name in found if name != "native"] == expected
        assert costs.seconds("all_reduce", 12, 3, "private", nbytes, "ring") == pytest.approx(
            seconds("ring", 12, nbytes)
        )
    assert costs.order("all_reduce", 8, 1, "private", 1 << 13) == ()  # nothing is known of one node
    assert costs.order("all_reduce", 8, 2, "window", 1 << 13) == ()
    assert costs.order("broadcast", 8, 2, "private", 1 << 13) == ()


def test_the_costs_of_other_algorithms_grow_with_what_a_rank_receives():
    samples: list[model.Sample] = [
        ("all_gather", ranks, 1, "window", nbytes, "window", 5e-6 + (ranks - 1) / ranks * nbytes * 1e-10)
        for ranks in (2, 8)
        for nbytes in (1 << 12, 1 << 20)
    ]
    costs = model.fit(samples)
    assert costs.seconds("all_gather", 4, 1, "window", 1 << 24, "window") == pytest.approx(5e-6 + 0.75e-10 * (1 << 24))
    assert costs.order("all_gather", 4, 1, "window", 1 << 24) == ("window",)
    assert costs.order("all_gather", 16, 1, "window", 1 << 24) == ()  # beyond the measured ranks of one node
    assert costs.seconds("all_gather", 4, 1, "window", 1 << 24, "staged") == math.inf


def test_no_constant_is_negative():
    falling: list[model.Sample] = [("gather", 2, 1, "private", n, "staged", 1e-5 - 1e-12 * n) for n in (1, 1000, 10**6)]
    alpha, beta, gamma = model.fit(falling).fitted[(False, "private"), "gather", "staged"]
    assert alpha == pytest.approx(1e-5, rel=0.1) and beta == gamma == 0
