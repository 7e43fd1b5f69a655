"""Saving when something goes wrong: a full disk, a closed folder, a kill; the old checkpoint is still there."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dtrain import checkpoint_folder, safetensors_file
from dtrain.checkpoint import Reader, latest, save, scan
from dtrain.collectives import run_threads
from dtrain.errors import UserError
from tests.checkpoints import replicated, save_one, visible, whole

pytestmark = pytest.mark.usefixtures("fast_disk")


def failures(size, function, *args):
    """The message of the UserError of every rank."""

    def run(comm):
        with pytest.raises(UserError) as caught:
            function(comm, *args)
        return str(caught.value)

    return run_threads(size, run)


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    save_one(tmp_path, 5, a=np.zeros(3)).rename(tmp_path / ".step_00000005.replaced")
    aside = tmp_path / ".step_00000005.replaced"
    assert latest(tmp_path) == aside and Reader(aside).read("a").tolist() == [0, 0, 0]
    save_one(tmp_path, 6, a=np.ones(3))
    assert latest(tmp_path) == tmp_path / "step_00000006" and aside.exists()  # still the one of step 5
    assert [found.folder.name for found in scan(tmp_path)] == [aside.name, "step_00000006"]
    save_one(tmp_path, 5, a=np.ones(3))
    assert visible(tmp_path) == ["step_00000005", "step_00000006"]
    shutil.copytree(tmp_path / "step_00000005", aside)  # killed after them
    assert [found.step for found in scan(tmp_path)] == [6, 5]
    shutil.rmtree(aside)
    save_one(tmp_path, 5, a=np.zeros(3)).rename(tmp_path / ".step_00000005.replaced")
    save_one(tmp_path, 7, keep=1, a=np.ones(3))
    assert visible(tmp_path) == ["step_00000007"]


def fail_on(monkeypatch, file, number):
    """Writing `file` fails after some bytes."""
    real = safetensors_file.write

    def write(path, entries, metadata=None):
        if path.name != file:
            return real(path, entries, metadata)
        path.write_bytes(b"some")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(safetensors_file, "write", write)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_one_rank_that_cannot_write_ends_the_save_on_all(tmp_path, monkeypatch, number):
    run_threads(3, replicated, tmp_path, 1)
    with monkeypatch.context() as patch:
        fail_on(patch, "model-00002-of-00003.safetensors", number)
        messages = failures(3, replicated, tmp_path, 2)
    assert len({*messages}) == 1
    for word in (str(tmp_path / "step_00000002"), os.strerror(number), "rank 2", "bytes; ", "bytes are free"):
        assert word in messages[0]
    assert visible(tmp_path) == ["step_00000001"]
    assert Reader(latest(tmp_path)).verify() > 0
    run_threads(3, replicated, tmp_path, 2)
    assert latest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize("where", ["prepare", "publish"])
def test_rank_zero_that_cannot_write_ends_the_save_on_all(tmp_path, monkeypatch, where):
    run_threads(2, replicated, tmp_path, 1)

    def fail(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(checkpoint_folder.SharedFolder, where, fail)
    messages = failures(2, replicated, tmp_path, 2)
    assert len({*messages}) == 1 and "Permission denied" in messages[0]
    assert visible(tmp_path) == ["step_00000001"]


def test_a_replacement_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    folder = save_one(tmp_path, 5, a=np.zeros(3))
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="no"):
        save_one(tmp_path, 5, a=np.ones(3))
    assert visible(tmp_path) == ["step_00000005"] and Reader(folder).read("a").tolist() == [0, 0, 0]


def test_a_disk_without_room_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    messages = failures(2, replicated, tmp_path / "runs" / "x", 1)
    needed = 4 * 30 * sum(10 + i for i in range(8)) + 8 * 400
    assert len({*messages}) == 1
    assert f"It needs {needed:,} bytes; 10 bytes are free" in messages[0] and "No space left" in messages[0]
    assert visible(tmp_path / "runs" / "x") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("known", [True, False], ids=["known before", "found while writing"])
def test_a_real_full_disk(small_disk, monkeypatch, known):
    def run(comm, step, count):
        pieces = [whole(f"w{i}", np.full(count, i, np.float32)) for i in range(4)]
        return save(small_disk, step, comm, pieces, {"step": step}, keep=1)

    run_threads(2, run, 1, 30_000)
    if not known:
        free = shutil.disk_usage(small_disk).free
        answers = iter([10**12])  # the first one, before the write
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(answers, free)))
    messages = failures(2, run, 2, 60_000)
    assert len({*messages}) == 1 and "No space left on device" in messages[0] and str(small_disk) in messages[0]
    assert visible(small_disk) == ["step_00000001"] and Reader(latest(small_disk)).verify() > 480_000


def test_the_root_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        messages = failures(2, replicated, root)
        assert len({*messages}) == 1 and str(root) in messages[0]
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_without_permission():
    with tempfile.TemporaryDirectory() as outer:  # pytest's own folders let nobody else in
        closed = Path(outer) / "closed"
        closed.mkdir()
        Path(outer).chmod(0o755)
        closed.chmod(0o555)
        program = f"""
import os, numpy as np
from dtrain.checkpoint import Piece, save
from dtrain.collectives import single
from dtrain.errors import UserError
if os.getuid() == 0:
    os.setuid(65534)  # root may write everywhere
try:
    save({str(closed)!r}, 1, single(), [Piece("a", np.zeros(3), (0,), (3,))], {{}})
except UserError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert "Permission denied" in done.stdout and "step_00000001" in done.stdout, done.stdout + done.stderr
        assert visible(closed) == []


def test_killed_in_the_middle_of_a_save(tmp_path):
    save_one(tmp_path, 1, a=np.arange(1000.0))
    program = f"""
import time, numpy as np
from dtrain import safetensors_file
from dtrain.checkpoint import Piece, save
from dtrain.collectives import run_threads
real = safetensors_file.write
def slow(path, entries, metadata=None):
    if path.name == "model-00001-of-00002.safetensors":
        print("now", flush=True)
        time.sleep(60)
    return real(path, entries, metadata)
safetensors_file.write = slow
def run(comm):
    return save({str(tmp_path)!r}, 2, comm, [Piece("a", np.ones(500), (500 * comm.rank,), (1000,))], {{"step": 2}}, 1)
run_threads(2, run)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    deadline = time.monotonic() + 10
    first = tmp_path / ".step_00000002.partial" / "model-00000-of-00002.safetensors"
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert first.exists()  # a file of the new one is there, and it is not seen
    assert [found.step for found in scan(tmp_path)] == [1]
    assert Reader(latest(tmp_path)).read("a").tolist() == list(range(1000))
    save_one(tmp_path, 2, a=np.ones(5))
    assert visible(tmp_path) == ["step_00000001", "step_00000002"]


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc")
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    save_one(tmp_path, 1, a=np.zeros(3))
    partial = str(tmp_path / ".step_00000001.partial")
    shard = f"{partial}/model-00000-of-00001.safetensors"
    assert events == [shard, f"{partial}/manifest.json", partial, "rename", str(tmp_path)]
