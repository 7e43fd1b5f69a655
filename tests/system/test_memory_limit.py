"""ZeRO-3 trains what does not fit: each rank in a memory cgroup that the training state of the whole model exceeds.

19.1 million parameters: 16 bytes of state each (parameter, gradient, two moments in float32) are 305 MB. The limit is
260 MiB (273 MB) per rank; with zero3 a rank of 8 peaks near 125 MB, most of it Python and the libraries.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import program

LIMIT = 260 << 20
RANKS = 8
RANK = """#!/bin/bash
group=$1/rank$$; shift
mkdir $group && echo {limit} > $group/{limit_file} && echo $$ > $group/cgroup.procs
"$@"; code=$?
cat $group/{peak_file} > {peaks}/$$
exit $code
"""
# Of cgroup version 1 and 2: the limit, and the most that was used.
FILES = {"1": ("memory.limit_in_bytes", "memory.max_usage_in_bytes"), "2": ("memory.max", "memory.peak")}


@pytest.fixture
def group() -> Iterator[tuple[Path, str]]:
    """A cgroup of this test below our own, and its version."""
    if os.geteuid() != 0:
        pytest.skip("a memory cgroup needs root")
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in own:
        folder, version = Path("/sys/fs/cgroup/memory" + own["memory"]), "1"
    else:
        folder, version = Path("/sys/fs/cgroup" + own.get("", "/")), "2"
    made = folder / f"dtrain-{os.getpid()}"
    try:
        made.mkdir()
        if version == "2":
            (made / "cgroup.subtree_control").write_text("+memory")
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield made, version
    finally:
        for each in [*made.glob("rank*"), made]:
            for _ in range(50):  # the last process may not be gone yet
                if subprocess.run(["rmdir", str(each)], capture_output=True, check=False).returncode == 0:
                    break
                subprocess.run(["sleep", "0.1"], check=False)


@pytest.mark.timeout(280)
def test_zero3_trains_what_one_rank_could_not_hold(group: tuple[Path, str], tmp_path: Path, text: Path) -> None:
    folder, version = group
    if program.MPIRUN is None:
        pytest.skip("no mpirun")
    limit_file, peak_file = FILES[version]
    peaks = tmp_path / "peaks"
    peaks.mkdir()
    rank = tmp_path / "rank.sh"
    rank.write_text(RANK.format(limit=LIMIT, limit_file=limit_file, peak_file=peak_file, peaks=peaks))
    rank.chmod(0o755)
    config = program.write_config(
        tmp_path,
        text,
        model={"kind": "gpt", "layers": 6, "dim": 512, "heads": 8, "sequence": 32},
        train={"steps": 1, "global_batch": 8, "micro_batch": 1, "dtype": "float32"},
        checkpoint={"every": 0},
        sample={"tokens": 0},
    )

    def run(data_parallel: str) -> subprocess.CompletedProcess[str]:
        command = [program.MPIRUN, "-n", str(RANKS), str(rank), str(folder)]
        command += [str(program.BIN / "dtrain"), "run", str(config), f"parallel.data_parallel={data_parallel}"]
        options = {"capture_output": True, "text": True, "env": program.environ(), "cwd": tmp_path}
        return subprocess.run(command, timeout=program.LIMIT, check=False, **options)  # type: ignore[call-overload, no-any-return]

    sharded = run("zero3")
    assert sharded.returncode == 0, sharded.stdout + sharded.stderr
    used = [int(file.read_text()) for file in peaks.iterdir()]
    assert len(used) == RANKS and max(used) < LIMIT
    assert run("ddp").returncode != 0, "the limit is no limit: the test is void"
