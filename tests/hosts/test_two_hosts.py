"""The tests for any number of ranks, on two hosts that share nothing but files and a network."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.hosts.namespaces import DEVICE, Hosts

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


# Sums in rank order, as `window` tests them, are promised within a node; the same bits on all ranks everywhere. Few
# starts: four interpreters and their links take as long as some of the files. Both levels have the three uneven hosts
# below, and what the link carries of their results.
@pytest.mark.parametrize(
    "chosen",
    [
        {"test_collectives.py": "not window"},
        {"test_ddp.py": "", "test_layouts.py": "gpt2 or llama", "test_resume.py": "adamw"},
    ],
    ids=["collectives", "training"],
)
def test_the_suite_of_all_ranks(hosts: Hosts, chosen: dict[str, str]) -> None:
    before = hosts.bytes_sent()
    files = [str(ROOT / "tests" / "mpi" / file) for file in chosen]
    words = " or ".join(f"({file} and ({tests}))" if tests else file for file, tests in chosen.items())
    done = hosts.run(4, sys.executable, "-m", "pytest", "-q", "-x", "-k", words, "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(re.findall(r"\d+ passed", done.stdout)) == 4, done.stdout[-2000:]
    assert hosts.bytes_sent() - before > 1_000_000 * len(chosen), "the ranks did not talk over the link"


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
    assert [row["step"] for row in rows] == [1, 2, 4, 6] and rows[-1]["loss"] < rows[0]["loss"]


def test_uneven_hosts_and_ranks_in_turns(three_hosts: Hosts) -> None:
    """Three hosts with 3, 1 and 2 ranks, which the tests number in turns."""
    tests = str(ROOT / "tests" / "mpi" / "test_hierarchy.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    done = three_hosts.run([3, 1, 2], *command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(re.findall(r"\d+ passed", done.stdout)) == 6, done.stdout[-2000:]


# Inside a namespace /sys shows its own devices: a rank reads what its host has sent, between two barriers.
COUNTED = """
import json, sys, numpy as np
from pathlib import Path
from dtrain.collectives import world
c = world()
x = c.empty(1 << 20); x[...] = c.rank + 1  # 4 MiB
parts = np.repeat(np.arange(c.size) + 1, len(x) // c.size)  # a block of each rank
right = {"all_reduce": 10, "reduce_scatter": 10, "broadcast": 1, "all_to_all": parts}
right["all_gather"] = np.repeat(parts, c.size)
sent = lambda: int(Path(sys.argv[1]).read_text())
told = {}
for name in sys.argv[2:]:
    run = getattr(c, name)
    assert np.all(run(x, algorithm="hierarchical") == right[name]), name  # connections are made
    c.barrier()
    before = np.array([sent(), c.levels.sent])
    c.barrier()
    for _ in range(3): run(x, algorithm="hierarchical")
    c.barrier()
    link, counted = c.all_gather((np.array([sent(), c.levels.sent]) - before)[None]).reshape(-1, 2).T.tolist()
    told[name] = {"link": link[0], "counted": sum(counted[rank] for rank in c.levels.nodes[0])}
if c.rank == 0: print(json.dumps(told))
"""
MOVED = {"all_reduce": 1, "reduce_scatter": 0.5, "all_gather": 2, "broadcast": 1, "all_to_all": 1}


def test_the_link_carries_what_is_counted(hosts: Hosts) -> None:
    """The root of the broadcast is on the first host."""
    device = f"/sys/class/net/{DEVICE}/statistics/tx_bytes"
    done = hosts.run(4, sys.executable, "-c", COUNTED, device, *MOVED)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name, part in MOVED.items():
        assert told[name]["counted"] == 3 * part * (1 << 22), name
        assert abs(told[name]["link"] / told[name]["counted"] - 1) < 0.05, f"{name}: headers are less: {told}"
