"""What rank 0 tells of a run: the lines, the bar, and where the output ends up."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dtrain.config import AdamWConfig, Config, GPTConfig, ImagesConfig, LogConfig, MLPConfig, TextConfig, TrainConfig
from dtrain.launch import progress
from dtrain.launch.progress import Progress
from dtrain.trainer import StepRecord


def config(every=10, kind="gpt"):
    rows = kind == "mlp"
    return Config(
        name="test",
        model=MLPConfig() if rows else GPTConfig(),
        data=ImagesConfig(path="digits") if rows else TextConfig(path="stdlib"),
        optimizer=AdamWConfig(learning_rate=1e-3),
        train=TrainConfig(steps=200, global_batch=8, micro_batch=1),
        log=LogConfig(every=every),
    )


def record(step, seconds=0.5, validation=None):
    return StepRecord(step, 4.12341, 1.2344, 1e-3, seconds, 1000, validation)


def told(records, total=200, start=0, **options):
    stream = io.StringIO()
    with Progress(config(**options), total, start, stream=stream, started=0.0) as shown:
        for each in records:
            shown.update(each)
    return stream.getvalue().splitlines()


def test_a_line_is_aligned_and_complete():
    line = progress.step_line(record(10), 200, 12345.4, 12.4)
    assert line == "step   10/200  loss 4.1234  grad_norm 1.234  lr 1.0e-03      12,345 tokens/s  eta 0:00:12"
    assert len(progress.step_line(record(200), 200, 1.0, 0.0)) == len(line)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (-1, "0:00:00"), (360000, "100:00:00")]
)
def test_clock(seconds, shown):
    assert progress.clock(seconds) == shown


def test_lines_come_at_the_first_every_tenth_and_last_step():
    lines = told([record(step) for step in range(1, 26)], total=25)
    assert re.fullmatch(r"first step after \d+\.\d s", lines[0])
    assert [int(line.split("/")[0].split()[1]) for line in lines[1:]] == [1, 10, 20, 25]


def test_speed_and_time_left_forget_a_slow_first_step():
    lines = told([record(1, 100.0), record(2, 0.5), record(10, 0.5)])
    assert "2,000 tokens/s" in lines[-1] and lines[-1].endswith("eta 0:01:35")  # 190 steps of half a second


def test_given_speed_is_shown():
    stream = io.StringIO()
    with Progress(config(), 200, stream=stream) as shown:
        shown.update(record(10), tokens_per_second=777.0)
    assert " 777 tokens/s" in stream.getvalue()


def test_validation_loss_has_its_line():
    lines = told([record(1), record(7, validation=3.21987)])
    assert lines[-1] == "step    7/200  validation loss 3.2199"


def test_rows_are_counted_in_samples():
    assert "samples/s" in told([record(1)], kind="mlp")[-1]


def test_other_ranks_are_silent():
    stream = io.StringIO()
    with Progress(config(), 200, on=False, stream=stream) as shown:
        shown.update(record(1))
        shown.note("nothing")
    assert stream.getvalue() == ""


def test_lines_need_no_rich():
    code = (
        "import io, sys, test_progress as t; t.told([t.record(1), t.record(10)]); sys.exit('rich' in sys.modules or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, timeout=60)


def read_all(terminal, received):
    try:
        while piece := os.read(terminal, 4096):
            received.append(piece)
    except OSError:  # how Linux says that the other end was closed
        pass
    os.close(terminal)


def test_a_terminal_gets_a_bar_and_the_same_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    received: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(leader, received))
    reader.start()
    with os.fdopen(follower, "w") as stream:
        assert progress.terminal_width(stream) == 80  # a new terminal has 0 columns
        with Progress(config(), 20, stream=stream, started=0.0) as shown:
            for step in range(1, 21):
                shown.update(record(step))
    reader.join(timeout=30)
    output = b"".join(received).decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "step   10/20  loss 4.1234" in plain
    assert "━" in plain and "20/20" in plain
    assert "\x1b[?25h" in output  # the cursor is back


def test_dumb_terminals_get_lines(monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        monkeypatch.setenv("TERM", "dumb")
        assert progress.terminal_width(stream) is None
    os.close(leader)


def test_the_terminal_of_a_rank_is_not_that_of_its_launcher(monkeypatch):
    """Open MPI gives each rank a terminal, also where `mpirun … > log` goes to a file."""
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        assert progress.terminal_width(stream) is not None
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        assert progress.terminal_width(stream) is None
    os.close(leader)


def processes(folder, *chain):
    """A /proc of processes (number, parent, name, stdout)."""
    for number, parent, name, stdout in chain:
        (folder / str(number) / "fd").mkdir(parents=True)
        (folder / str(number) / "stat").write_text(f"{number} ({name}) S {parent} 1 1 0")
        (folder / str(number) / "fd" / "1").symlink_to(stdout)
    return folder


def test_the_terminal_behind_mpirun(tmp_path):
    proc = processes(
        tmp_path,
        (40, 30, "hydra_pmi_proxy", "pipe:[17]"),
        (30, 20, "mpiexec.hydra", "/dev/pts/3"),
        (20, 1, "bash (odd) name", "/dev/pts/9"),
    )
    assert progress.launcher_terminal(40, proc) == "/dev/pts/3"


def test_mpirun_into_a_file_is_no_terminal(tmp_path):
    proc = processes(tmp_path, (40, 30, "hydra_pmi_proxy", "pipe:[17]"), (30, 1, "mpirun", "/home/me/log.txt"))
    assert progress.launcher_terminal(40, proc) is None


def test_no_mpirun_above(tmp_path):
    assert progress.launcher_terminal(40, processes(tmp_path, (40, 1, "bash", "/dev/pts/3"))) is None
    assert progress.launcher_terminal(40, tmp_path / "missing") is None


def test_a_process_knows_when_it_started():
    import time

    assert time.time() - 3600 < progress.process_start() <= time.time() + 0.02
