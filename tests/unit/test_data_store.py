import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dtrain.collectives import run_threads
from dtrain.data import store
from dtrain.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_entry_is_made_once(folder):
    made = []

    def make(place: Path) -> None:
        made.append(place)
        (place / "a").write_text("content")

    for _ in range(2):
        entry = store.cached("kind", "name", make)
        assert (entry / "a").read_text() == "content"
    assert len(made) == 1 and os.listdir(folder / "kind") == ["name"]


@pytest.mark.parametrize("error", [UserError("source"), KeyboardInterrupt()])
def test_an_entry_that_fails_is_not_there(folder, error):
    def make(place: Path) -> None:
        (place / "a").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.cached("kind", "name", make)
    assert not [name for name in os.listdir(folder / "kind") if not name.endswith(".lock")]
    assert (store.cached("kind", "name", lambda place: None)).is_dir(), "and can be made later"


def test_without_locks_the_first_rename_wins(folder, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    both = threading.Barrier(2, timeout=20)
    entries, failures = [], []

    def make(place: Path) -> None:
        (place / "a").write_text("same")
        both.wait()  # both are inside before one of them renames

    def work() -> None:
        try:
            entries.append(store.cached("kind", "name", make))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and [(entry / "a").read_text() for entry in entries] == ["same", "same"]
    assert os.listdir(folder / "kind") == ["name"]


def test_processes_wait_for_the_one_that_makes_it(folder, tmp_path):
    """The entry takes its time; with the lock only one of four processes makes it."""
    program = f"""
import os, time
from dtrain.data import store
def make(place):
    open({str(tmp_path)!r} + "/made." + str(os.getpid()), "w").close()
    time.sleep(0.3)
    (place / "a").write_text("content")
print((store.cached("kind", "name", make) / "a").read_text())
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["content\n"] * 4
    assert len(list(tmp_path.glob("made.*"))) == 1


def test_a_cache_that_cannot_be_written_names_the_variable(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DTRAIN_CACHE") as caught:
        store.cached("kind", "name", lambda place: None)
    assert str(tmp_path / "file") in str(caught.value)


def test_a_full_disk_is_told_as_such(folder):
    def make(place: Path) -> None:
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 10_000)

    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        store.cached("kind", "name", make)


def test_headers_are_parsed_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """Python up to 3.11.4 fails at times when two parse at once."""
    names = [tmp_path / f"{k}.npy" for k in range(4)]
    for k, name in enumerate(names):
        np.save(name, np.arange(k + 1))
    load, inside = np.load, []

    def slowly(*arguments, **options):
        inside.append(1)
        assert len(inside) == 1, "two at once"
        time.sleep(0.01)
        inside.pop()
        return load(*arguments, **options)

    monkeypatch.setattr(np, "load", slowly)
    found = run_threads(4, lambda comm: store.map_npy(names[comm.rank]))
    assert [array.tolist() for array in found] == [list(range(k + 1)) for k in range(4)]
