"""Real jobs that would hang: each ends by itself, exit code 1, and says which rank waits where for whom."""

import json
import re
from pathlib import Path

import pytest

from tests.system import program
from tests.system.program import Ended, Process

pytestmark = pytest.mark.skipif(program.MPIRUN is None, reason="no mpirun: neither the wheel's nor the system's")

JOB = """
import os, sys, time
import numpy as np
from dtrain.launch.failures import guard
with guard():
    from dtrain.collectives import world
    comm = world()
    case, first, second = sys.argv[1], comm.rank == 0, comm.rank == 1
    x = np.ones(1000, np.float32)
    comm.all_reduce(x)
    if case == "slow" and second: time.sleep(1.2)
    if case == "slow": [comm.all_reduce(x, algorithm=name) for name in ("staged", "native")]
    if case == "count": comm.all_reduce(x[second:], algorithm="native")
    if case == "count, started": comm.all_reduce_async(x[second:]).wait()
    if case == "root": comm.broadcast(x, root=int(second))
    if case == "never": time.sleep(60) if second else comm.all_reduce(x)
    if case == "recv": comm.recv(x, (comm.rank + 1) % comm.size)
    if case == "recv_async" and first: comm.recv_async(x, 1, tag=7).wait()
    if case == "recv_async": time.sleep(60)
    if case == "stopped" and second: os.kill(os.getpid(), 19)
    if case == "stopped": comm.all_reduce(x)
    if case.startswith("open"):
        shared = comm.empty(100_000)
        works = [comm.all_reduce_async(shared, out=shared), comm.all_reduce_async(x), comm.barrier_async()]
        works += [comm.recv_async(x.copy(), 1)] if first else []
        if case == "open, closed":
            works = works[:3]
            comm.close()
            assert shared[0] is not None and works[0].done()
        if case == "open, fault" and second: raise ZeroDivisionError("unlucky")
        if case == "open, fault": time.sleep(60)
        sys.exit()
    comm.barrier()
    print("well")
"""


def end(case: str, folder: Path, **variables: str) -> Ended:
    """How the job ends on three ranks in a folder of its own."""
    job = folder / "job.py"
    job.write_text(JOB)
    variables = {"DTRAIN_TIMEOUT": "2", "PYTHONPATH": str(program.ROOT)} | variables
    return Process(program.on(3, program.BIN / "python", job, case), folder, **variables).finish(60)


def told(ended: Ended, *patterns: str) -> str:
    """One report, and the words in it."""
    words = ended.words
    assert ended.code != 0, words
    assert len(re.findall(r"^dtrain\.collectives\.waiting\.Collective", words, re.M)) == 1, words
    for pattern in patterns:
        assert re.search(pattern, words), f"{pattern} not in:\n{words}"
    return words


@pytest.mark.parametrize("case", ["count", "count, started", "root"])
def test_different_calls_on_one_node(case: str, tmp_path: Path) -> None:
    told(
        end(case, tmp_path, DTRAIN_TIMEOUT="30"), r"rank \d came to .* at job\.py:\d+, .* rank \d to .* at job\.py:\d+"
    )


def test_in_shared_memory(tmp_path: Path) -> None:
    ended = end("never", tmp_path)
    told(
        ended,
        r"rank [02] of 3 waited 2 s for rank 1 in all_reduce #2 .* at job\.py:\d+",
        r"rank 1 last came to all_reduce #1",
        r"rank 1 now: in no collective, at job\.py:\d+",
    )
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("hang_rank_*.json"))]
    assert [each["rank"] for each in found] == [0, 1, 2]
    assert found[1]["recent"][-1]["collective"] == "all_reduce"
    assert any("time.sleep(60)" in line for line in found[1]["stacks"]["MainThread"])


def test_in_a_receive(tmp_path: Path) -> None:
    told(
        end("recv", tmp_path),
        r"rank \d of 3 waited [2-5] s in recv\(float32 \(1000,\), source=\d, tag=0\) at job\.py:\d+",
        r"rank \d now: in recv\(float32",
        "The stack of the thread that waits",
    )


def test_in_the_wait_for_a_message(tmp_path: Path) -> None:
    told(end("recv_async", tmp_path), r"rank 0 of 3 waited [2-5] s in wait\(recv from 1 tag 7\) at job\.py:\d+")


def test_a_rank_that_was_stopped_does_not_answer(tmp_path: Path) -> None:
    ended = end("stopped", tmp_path, DTRAIN_TIMEOUT="14")  # and long before, one of those who wait says so
    words = told(
        ended,
        "for rank 1 in all_reduce #2",
        r"dtrain: waiting: rank \d of 3 has waited \d+ s in all_reduce\(float32 \(1000,\), op=sum\) at job\.py:\d+.*\n"
        r"dtrain: waiting: rank 1 does not answer",
    )
    assert words.count("has waited") == 1


def test_one_that_is_slow_is_let_be(tmp_path: Path) -> None:
    ended = end("slow", tmp_path)
    assert (ended.code, ended.out.count("well")) == (0, 3), ended.words


@pytest.mark.parametrize("thread", ["thread", "none"])
@pytest.mark.parametrize("case", ["open, left", "open, closed"])
def test_open_works_do_not_keep_a_program_from_ending(case: str, thread: str, tmp_path: Path) -> None:
    ended = end(case, tmp_path, DTRAIN_PROGRESS=thread, DTRAIN_TIMEOUT="30")
    assert (ended.code, ended.words) == (0, ""), ended.words


@pytest.mark.parametrize("thread", ["thread", "none"])
def test_a_fault_with_open_works(thread: str, tmp_path: Path) -> None:
    ended = end("open, fault", tmp_path, DTRAIN_PROGRESS=thread, DTRAIN_TIMEOUT="30")
    assert ended.code != 0 and ended.words.count("ZeroDivisionError: unlucky") == 1, ended.words
