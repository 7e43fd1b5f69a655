"""Finding the mpirun that belongs to the MPI library, and what its last words say about who ended first."""

import os
import sys
from pathlib import Path

import pytest

from dtrain.errors import UserError
from dtrain.launch import environment, mpirun, restarts

MPICH, INTEL, OPEN_MPI = mpirun.KINDS
LIBRARIES = {
    "MPICH": "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25",
    "Intel MPI": "Intel(R) MPI Library 2021.18.1 for Linux* OS",
    "Open MPI": "Open MPI v5.0.11, package: Open MPI user@localhost Distribution",
}
PROGRAMS = {
    "MPICH": "HYDRA build details:",
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626",
    "Open MPI": "mpirun (Open MPI) 5.0.11",
}


def program(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A Python with nothing beside it, on a PATH of two folders."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'first'}:{tmp_path / 'second'}:{os.defpath}")
    return tmp_path


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_mpirun_of_the_library_is_taken_wherever_it_stands(elsewhere, monkeypatch, name):
    monkeypatch.setattr(mpirun, "library", lambda: LIBRARIES[name])
    for number, (other, says) in enumerate(PROGRAMS.items()):
        if other != name:
            program(elsewhere / ("first", "bin")[number % 2], "mpirun", says)
    with pytest.raises(UserError, match=f"mpirun: none of {name}, .*of another MPI: .*mpirun.* pip install"):
        mpirun.find()
    kind = next(kind for kind in mpirun.KINDS if kind.name == name)
    right = program(elsewhere / "second", kind.programs[-1], PROGRAMS[name])
    if right.name == "mpirun":  # the script of Intel; hidden by those before it
        right = right.rename(right.with_name(kind.programs[0]))
    assert mpirun.find() == mpirun.Mpirun(str(right), kind)
    beside = program(elsewhere / "bin", kind.programs[0], PROGRAMS[name])
    assert mpirun.find() == mpirun.Mpirun(str(beside), kind)


def test_a_library_that_is_not_known(monkeypatch):
    monkeypatch.setattr(mpirun, "library", lambda: "Some MPI 1.0")
    with pytest.raises(UserError, match=r"MPI: Some MPI 1.0: .* dtrain run"):
        mpirun.find()


def test_the_library_is_told_in_one_line():
    assert "\n" not in mpirun.library() and any(kind.library in mpirun.library() for kind in mpirun.KINDS)


def test_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("MPI4PY_LIBMPI", str(tmp_path / "libmpi.so"))
    with pytest.raises(UserError, match=r"MPI: .*libmpi.so: cannot open.*; pip install"):
        mpirun.library()


def test_leave_is_given_where_it_is_needed_and_the_user_has_not_said_otherwise(monkeypatch):
    for name in (*OPEN_MPI.root, *OPEN_MPI.crowded):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "cores", lambda: 4)
    monkeypatch.setattr(environment, "threads_per_core", lambda: 1)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    start = mpirun.Mpirun("mpirun", OPEN_MPI)
    assert start.leave(4) == {}
    assert start.leave(5) == OPEN_MPI.crowded
    assert start.leave(5, elsewhere=True) == {}
    assert mpirun.Mpirun("mpirun", MPICH).leave(5) == {}
    monkeypatch.setattr(environment, "threads_per_core", lambda: 2)  # Open MPI counts whole cores
    assert start.leave(4) == OPEN_MPI.crowded
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert start.leave(2) == OPEN_MPI.root
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "0")
    assert start.leave(2) == {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def test_options_of_the_user_are_passed_on(tmp_path):
    start, hosts = mpirun.Mpirun("mpirun", OPEN_MPI), tmp_path / "hosts"
    with pytest.raises(UserError, match=r"--hosts: .*hosts: no such file"):
        restarts._options(start, hosts, "")
    hosts.touch()
    assert restarts._options(start, hosts, "-x 'A B'") == ["--hostfile", str(hosts), "-x", "A B"]
    with pytest.raises(UserError, match=r"--mpi: .*: No closing quotation"):
        restarts._options(start, None, "-x 'A")


HOSTS = "[mpiexec@a] Exit codes: [a] 0,0\n[b] 9,0\n"
PRTE = """--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 9651 on node vm exited on
signal 9 (Killed).
--------------------------------------------------------------------------
"""
LEFT = "The first process to do so was:\n\n   Process name: [prterun-vm-9832@1,1]\n   Exit code:    3\n"
ORTE = "mpirun noticed that process rank 3 with PID 0 on node vm exited on signal 11 (Segmentation fault).\n"
GONE = """ORTE has lost communication with a remote daemon.

  HNP daemon   : [[30,0],0] on node a
  Remote daemon: [[30,0],1] on node b

This is usually due to either a failure of the TCP network"""


@pytest.mark.parametrize(
    ("kind", "said", "told"),
    [
        (MPICH, "[mpiexec@vm] Exit codes: [vm] 0,9,0\n", "rank 1 on vm was killed by signal 9"),
        (MPICH, "[mpiexec@vm] Exit codes: [vm] 9,11,0\n", "rank 1 on vm was killed by signal 11"),
        (MPICH, "[mpiexec@vm] Exit codes: [vm] 9,9,0\n", "rank 0 or 1 on vm was killed by signal 9"),
        (MPICH, "[mpiexec@vm] Exit codes: [vm] 0,768\n", "rank 1 on vm ended with exit code 3"),
        (MPICH, "[mpiexec@vm] Exit codes: [vm] 0,0\n", ""),
        (MPICH, "[mpiexec@vm] Exit codes: [vm] 0,", ""),  # more is to come
        (MPICH, HOSTS, "a rank on b was killed by signal 9"),
        (INTEL, "=   KILLED\n[mpiexec@vm] Exit codes: [vm:0] 9,768,9\n", "rank 1 on vm ended with exit code 3"),
        (INTEL, "[mpiexec@vm] Exit codes: [vm:0] 9,9,9\n", "a rank on vm was killed by signal 9"),
        (OPEN_MPI, PRTE, "rank 1 on vm was killed by signal 9"),
        (OPEN_MPI, ORTE, "rank 3 on vm was killed by signal 11"),
        (OPEN_MPI, LEFT, "rank 1 ended with exit code 3"),
        (OPEN_MPI, GONE, "host b is lost"),
        (OPEN_MPI, "step 10", ""),
    ],
)
def test_who_ended_first(kind, said, told):
    assert kind.lost(f"step 5\n{said}") == told


def test_exit_codes_are_not_shown():
    assert mpirun.without_exit_codes(b"[mpiexec@a] Exit codes: [a] 0,0\n[b] 9,0\nKilled") == b"Killed"
    assert mpirun.without_exit_codes(b"[mpiexec@a] else\n") == b"[mpiexec@a] else\n"
