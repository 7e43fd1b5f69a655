"""A scatter tells its form and, where it is short, its rows in one letter."""

import numpy as np
import pytest

from dtrain.collectives.communicator import Communicator
from dtrain.collectives.letters import HEAD, KNOWN, ROOM, Form, Letter
from dtrain.collectives.threads import run_threads

WIDE = np.dtype([(f"a rather long name of a field {number}", "f4") for number in range(40)])


def test_forms_come_again_and_change() -> None:
    def program(comm: Communicator) -> None:
        for turn in range(3):
            for rows in (0, 1, comm.size - 1, comm.size, 7, ROOM // 8 // comm.size * comm.size, ROOM):
                whole = np.arange(rows, dtype=np.float64) + turn
                mine = comm.scatter(whole if comm.rank == 1 else None, root=1)
                np.testing.assert_array_equal(mine, np.array_split(whole, comm.size)[comm.rank])
                started = comm.scatter_async(whole if comm.rank == 1 else None, root=1)
                np.testing.assert_array_equal(started.wait(), mine)

    run_threads(3, program)


def test_one_letter_for_what_is_short_and_the_library_for_the_rest() -> None:
    def program(comm: Communicator) -> list[str]:
        ran = []
        for count in (ROOM // 4 // comm.size * comm.size, ROOM):
            comm.scatter(np.ones(count, np.float32) if comm.rank == 0 else None)
            assert comm.last is not None
            ran.append(comm.last.algorithm)
        return ran

    assert run_threads(2, program) == [["letter", "native"]] * 2


def test_a_form_too_long_for_the_head_follows() -> None:
    assert len(str(WIDE.descr)) > HEAD

    def program(comm: Communicator) -> None:
        whole = np.zeros((comm.size + 1, 2), WIDE)
        whole[WIDE.names[0]] = np.arange(whole.size).reshape(whole.shape)
        for _ in range(2):
            mine = comm.scatter(whole if comm.rank == 0 else None, out=None)
            np.testing.assert_array_equal(mine, np.array_split(whole, comm.size)[comm.rank])
            few = comm.scatter(np.arange(comm.size) if comm.rank == 0 else None)
            assert few.tolist() == [comm.rank]

    run_threads(2, program)


def test_the_result_does_not_lie_in_the_letter() -> None:
    def program(comm: Communicator) -> None:
        first = comm.scatter(np.arange(comm.size) if comm.rank == 0 else None)
        comm.scatter(np.arange(comm.size) + 100 if comm.rank == 0 else None)
        assert first.tolist() == [comm.rank]

    run_threads(2, program)


def test_what_is_known_does_not_grow() -> None:
    letter = Letter(0)
    for number in range(3 * KNOWN):
        form = Form([number], [], "'<f4'", None, False)
        assert letter.write(number, lambda form=form: form).form == form  # type: ignore[misc]
        known = letter.read(letter.octets)
        assert known is not None and known.form == form and known.block is None
    assert len(letter._written) <= KNOWN and len(letter._read) <= KNOWN


def test_a_mistake_of_root_is_told() -> None:
    def program(comm: Communicator) -> None:
        comm.scatter(np.arange(4), counts=[1, 1])

    with pytest.raises(ValueError, match="counts="):
        run_threads(2, program)
