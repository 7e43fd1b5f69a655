"""Parameter servers as real processes: the folder of a run, going on, a worker that stops answering."""

import json
import os
import signal

import pytest

from tests.system import program
from tests.system.program import MPIRUN, Process, on, well

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(MPIRUN is None, reason="no mpirun")]

TRAIN = {"steps": 4, "global_batch": 12, "micro_batch": 2, "dtype": "float64"}


def test_a_run_leaves_its_folder_and_goes_on_with_other_servers(tmp_path, text):
    section = {"servers": 2, "mode": "ssp", "staleness": 1}
    config = program.write_config(
        tmp_path, text, train=TRAIN, checkpoint={"every": 2}, parameter_server=section, sample={"tokens": 5}
    )
    ended = well("run", config, ranks=4)
    assert "ssp: 2 workers, 2 servers" in ended.out and "staleness" in ended.out
    run = tmp_path / "runs" / "small"
    found = json.loads((run / "summary.json").read_text())["parameter_server"]
    assert sum(found["gradients_by_worker"]) == sum(found["staleness"].values()) == found["updates"] == 8
    assert (run / "staleness.svg").read_text().startswith("<svg") and (run / "sample.txt").exists()
    assert [row["step"] for row in program.metrics(run)] == [1, 2, 3, 4]
    peaks = json.loads((run / "summary.json").read_text())["peak_memory_bytes_per_rank"]
    assert len(peaks) == 4 and min(peaks) > 2e7  # two workers, two servers
    ended = well("run", config, "train.steps=6", "parameter_server={servers: 1}", ranks=2)
    assert "step 4 of 6" in ended.out
    assert [row["step"] for row in program.metrics(run)] == [1, 2, 3, 4, 5, 6]
    ended = well("run", config, "train.steps=7", "parameter_server={servers: 0}", ranks=2)  # without any, too
    assert "step 6 of 7" in ended.out


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_worker_that_is_stopped(mode, tmp_path, text):
    """Asynchronous: it is lost, the others do its work, the job ends well. Synchronous: a report, and the end."""
    section = {"servers": 1, "mode": mode, "timeout": 3.0}
    config = program.write_config(
        tmp_path, text, name=f"stopped-{mode}", train={**TRAIN, "steps": 40}, checkpoint={"every": 0},
        parameter_server=section, sample={"tokens": 0},
    )  # fmt: skip
    job = Process(on(4, "dtrain", "run", config))
    program.wait_for(lambda: "step    3/" in job.words()[0], what="the third step")
    worker = next(process for process, _ in program.processes(str(config)) if rank_of(process) == 1)
    os.kill(worker, signal.SIGSTOP)
    ended = job.finish()
    said = ended.out + ended.err
    assert "no sign of life for 3 s" in said
    if mode == "async":
        assert ended.code == 0, said
        assert "2 go on" in ended.out and "trained 40 steps" in ended.out
    else:
        assert ended.code != 0 and "sync needs 3 of 3 workers, 2 are left" in said
    program.wait_for(lambda: not program.processes(str(config)), 20, "the end of all ranks")


@pytest.mark.parametrize("mode", ["async", "ssp", "sync"])
def test_a_worker_that_is_killed(mode, tmp_path, text):
    """Its connection closes, that is the notice: `timeout` is far away. mpirun needs no option for it."""
    section = {"servers": 1, "mode": mode, "transport": "sockets", "timeout": 600.0}
    config = program.write_config(
        tmp_path, text, name=f"killed-{mode}", train={**TRAIN, "steps": 40, "validate": {"every": 20}},
        checkpoint={"every": 20}, parameter_server=section, sample={"tokens": 0},
    )  # fmt: skip
    job = Process(on(4, "dtrain", "run", config))
    program.wait_for(lambda: "step    3/" in job.words()[0], what="the third step")
    of_rank_1 = [process for process, _ in program.processes(str(config)) if rank_of(process) == 1]
    worker = next(process for process in of_rank_1 if parent_of(process) in of_rank_1)  # the other one stands in
    os.kill(worker, signal.SIGKILL)
    ended = job.finish()
    said = ended.out + ended.err
    if mode == "sync":
        assert "worker 1 of 3: " in said and "sync needs 3 of 3 workers, 2 are left" in said
        assert "dtrain: rank 3 of 4 on" in said and "failed, the job ends" in said and ended.code == 1
    else:
        assert ended.code == 0, said
        assert "worker 1 (rank 1 on " in ended.out and "; 2 go on" in ended.out
        assert "trained 40 steps" in ended.out, said
        found = json.loads((tmp_path / "runs" / config.stem / "summary.json").read_text())["parameter_server"]
        assert list(found["lost"]) == ["1"]
        assert found["updates"] == sum(found["gradients_by_worker"]) == 120
        assert "Traceback" not in said
    program.wait_for(lambda: not program.processes(str(config)), 20, "the end of all ranks")


def rank_of(process: int) -> int | None:
    """The rank that the launcher gave to a process; None for those that have none."""
    try:
        with open(f"/proc/{process}/environ") as file:
            words = dict(word.partition("=")[::2] for word in file.read().split("\0"))
    except OSError:
        return None
    name = next((name for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK") if name in words), None)
    return None if name is None else int(words[name])


def parent_of(process: int) -> int:
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
