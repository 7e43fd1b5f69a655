"""The tests for any number of ranks, on two hosts that share nothing but files and a network."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.hosts.namespaces import Hosts

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[2]


def test_ranks_know_their_hosts(hosts: Hosts) -> None:
    code = (
        "from dtrain.collectives import world; c = world(); print(f'<{c.rank} {c.local_rank} {c.local_size} {c.host}>')"
    )
    done = hosts.run(4, sys.executable, "-c", code)
    found = sorted(re.findall(r"<(\d) (\d) (\d) (\S+)>", done.stdout))
    assert [row[:3] for row in found] == [("0", "0", "2"), ("1", "1", "2"), ("2", "0", "2"), ("3", "1", "2")], (
        done.stdout + done.stderr
    )
    assert found[0][3] == found[1][3] != found[2][3] == found[3][3]


# Sums in rank order, as `window` tests them, are promised within a node; the same bits on all ranks everywhere.
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_collectives.py", "not window"),
        ("test_hierarchy.py", ""),
        ("test_ddp.py", ""),
        ("test_layouts.py", "gpt2 or llama"),
        ("test_resume.py", "adamw"),
    ],
)
def test_the_suite_of_all_ranks(hosts: Hosts, file: str, chosen: str) -> None:
    before = hosts.bytes_sent()
    tests = str(ROOT / "tests" / "mpi" / file)
    done = hosts.run(4, sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(re.findall(r"\d+ passed", done.stdout)) == 4, done.stdout[-2000:]
    assert hosts.bytes_sent() - before > 1_000_000, "the ranks did not talk over the link"


def test_dtrain_run(hosts: Hosts, tmp_path: Path) -> None:
    small = ["model={kind: gpt, layers: 1, dim: 32, heads: 4, sequence: 16}", "train.steps=6", "log.every=2"]
    done = hosts.run(
        4,
        sys.executable,
        "-m",
        "dtrain.launch",
        "run",
        str(ROOT / "configs" / "gpt_ddp.yaml"),
        f"output={tmp_path}",
        *small,
    )
    assert done.returncode == 0, done.stdout + done.stdout + done.stderr
    assert "on 2 hosts" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "gpt-ddp" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and rows[-1]["loss"] < rows[0]["loss"]


def test_uneven_hosts_and_ranks_in_turns(three_hosts: Hosts) -> None:
    """Three hosts with 3, 1 and 2 ranks, which the tests number in turns."""
    tests = str(ROOT / "tests" / "mpi" / "test_hierarchy.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    done = three_hosts.run([3, 1, 2], *command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(re.findall(r"\d+ passed", done.stdout)) == 6, done.stdout[-2000:]


COUNTED = """
import sys, numpy as np
from dtrain.collectives import world
c = world(); name = sys.argv[1]; times = int(sys.argv[2])
x = c.empty(1 << 20); x[...] = 1  # 4 MiB
run = getattr(c, name)
before = c.levels.sent
for _ in range(times): run(x, algorithm="hierarchical")
c.barrier()
sent = c.all_gather(np.array([c.levels.sent - before]))
if c.rank == 0: print(f"<{sum(sent[r] for r in c.levels.nodes[0])}>")
"""


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"])
def test_the_link_carries_what_is_counted(hosts: Hosts, name: str) -> None:
    """What starting and ending cost is measured apart, by runs that send less."""
    bytes_of, counted = [], []
    for times in (1, 4):
        before = hosts.bytes_sent()
        done = hosts.run(4, sys.executable, "-c", COUNTED, name, str(times))
        assert done.returncode == 0, done.stderr
        bytes_of.append(hosts.bytes_sent() - before)
        counted.append(int(re.findall(r"<(\d+)>", done.stdout)[0]))
    n = 1 << 22  # bytes; root of the broadcast is on the first host
    assert counted[1] == 4 * n * {"all_gather": 2, "reduce_scatter": 0.5}.get(name, 1)
    on_link = bytes_of[1] - bytes_of[0]
    assert abs(on_link / (counted[1] - counted[0]) - 1) < 0.05, "headers are less than that"
