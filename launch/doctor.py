"""`dtrain doctor`: is everything as it should be on this machine? Each finding comes with its remedy.

    mpirun -n 4 dtrain doctor

     ok   ranks           4, as Hydra (MPICH, Intel MPI) started
    note  matplotlib      not installed: curves as pictures; pip install 'dtrain[plots]'
    FAIL  cache           /nowhere: cannot be written; set DTRAIN_CACHE to a folder that can

A check is a function that returns findings; `_CHECKS` is the list of them. One that fails to run is a finding itself.
"""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from dtrain import __version__
from dtrain.cache import cache_folder, check_writable
from dtrain.errors import UserError
from dtrain.launch import environment, mpirun


class Finding(NamedTuple):
    """One line: a `level` of ok, note (works, could be better) or FAIL (must be repaired)."""

    level: str
    name: str
    text: str


def examine() -> bool:
    """Print all findings on rank 0; return whether nothing must be repaired."""
    if environment.job().rank > 0:
        if not _foreign_launcher():  # MPI starts on all ranks or on none
            from dtrain.collectives import mpi

            mpi.position()
        return True
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding("FAIL", check.__name__.strip("_"), f"{type(error).__name__}: {error}"))
    for level, name, text in findings:
        click.echo(f"{level:>5}  {name:<12} {text}")
    return all(level != "FAIL" for level, _, _ in findings)


def _foreign_launcher() -> str:
    """Name the MPI library when the launcher is another MPI's: starting MPI could then end this process with a riddle.

    The library is asked where it does not start.
    """
    launcher = environment.job().launcher
    if not launcher.startswith(("Open MPI", "Hydra")):  # srun starts every MPI
        return ""
    try:
        told = mpirun.library()
    except UserError:
        return ""  # `_mpi` finds the same
    return told if ("Open MPI" in told) != ("Open MPI" in launcher) else ""


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", "dtrain", f"{__version__}, Python {python}, {platform.system()} {platform.machine()}")


def _mpi() -> Iterator[Finding]:
    job = environment.job()
    foreign = _foreign_launcher()
    if foreign:
        remedy = f"use the mpirun beside {sys.executable}, or install mpi4py for the MPI of this mpirun"
        yield Finding("FAIL", "MPI", f"mpirun is that of {job.launcher}, this Python's MPI is {foreign}; {remedy}")
        return
    try:
        from dtrain.collectives import mpi
    except (ImportError, RuntimeError) as error:
        remedy = "pip install 'dtrain[mpich]', or install a system MPI and put its libmpi on the library path"
        yield Finding("FAIL", "MPI", f"{' '.join(str(error).split())}; {remedy}")
        return
    yield Finding("ok", "MPI", mpi.library())
    _, size = mpi.position()
    try:
        environment.check_world(size)
    except UserError as error:
        yield Finding("FAIL", "ranks", str(error))
    else:
        yield Finding("ok", "ranks", f"{size}, as {job.launcher} started" if job.size > 1 else "1 (no mpirun)")
    try:
        found = mpirun.find().path
    except UserError as error:
        yield Finding("note", "mpirun", str(error).removeprefix("mpirun: "))
        return
    first = shutil.which("mpirun")
    if first is None:
        yield Finding("note", "mpirun", f"not on PATH; use {found}, or activate the environment")
    elif Path(first).parent != Path(found).parent:
        yield Finding("note", "mpirun", f"{first} is first on PATH, but that of this Python's MPI is {found}")
    else:
        yield Finding("ok", "mpirun", found)


def _cores() -> Iterator[Finding]:
    job, cores = environment.job(), environment.cores()
    whose = "its own" if environment.own_cores() else f"shared by {job.local_size} ranks"
    crowded = not environment.own_cores() and job.local_size > cores
    hint = "; more ranks than cores: fine to learn, slow to train" if crowded else ""
    yield Finding("note" if crowded else "ok", "cores", f"{cores} of {os.cpu_count()} usable, {whose}{hint}")


def _blas() -> Iterator[Finding]:
    import numpy as np

    wanted = environment.blas_threads()
    build = np.show_config(mode="dicts")
    name = build.get("Build Dependencies", {}).get("blas", {}).get("name", "BLAS")
    told = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if told == str(wanted):
        yield Finding("ok", "BLAS", f"NumPy {np.__version__} with {name}, threads per rank: {told}")
    else:
        yield Finding("note", "BLAS", f"NumPy with {name}, threads per rank: {told} by your variables; fair: {wanted}")


def _kernels() -> Iterator[Finding]:
    if importlib.util.find_spec("numba") is None:
        yield Finding("note", "kernels", "NumPy only: slower; pip install numba for the fused ones")
    else:
        import numba

        yield Finding("ok", "kernels", f"fused, by Numba {numba.__version__}")


def _folders() -> Iterator[Finding]:
    try:
        check_writable(cache_folder())
    except UserError as error:
        yield Finding("FAIL", "cache", str(error))
    else:
        free = shutil.disk_usage(cache_folder()).free >> 20
        yield Finding("ok" if free > 500 else "note", "cache", f"{cache_folder()}, {free} MiB free")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared)
        text = f"/dev/shm has {size.free >> 20} of {size.total >> 20} MiB free"
        enough = size.free >= 256 << 20
        remedy = "" if enough else "; shared windows live there: docker run --shm-size=2g, or fewer ranks"
        yield Finding("ok" if enough else "note", "shared", f"{text}{remedy}")


def _gpus() -> Iterator[Finding]:
    """What CuPy arrays would travel by: NCCL where every rank of the host has a GPU of its own."""
    if importlib.util.find_spec("cupy") is None:
        return  # `_packages` says so
    from dtrain.collectives import nccl

    count, name, memory = nccl.gpus()
    if not count:
        yield Finding("note", "GPUs", "CuPy sees none; nvidia-smi tells whether there is a driver")
        return
    ranks = environment.job().local_size
    crowded = f"; {ranks} ranks of this host share them" if count < ranks else f", {ranks} ranks on this host"
    yield Finding("note" if count < ranks else "ok", "GPUs", f"{count} of {name}, {memory >> 30} GiB each{crowded}")
    version = nccl.version()
    if not version:
        remedy = "pip install nvidia-nccl-cu12"
        yield Finding("note", "NCCL", f"not in this CuPy: arrays travel through host memory; {remedy}")
    elif count < ranks:
        yield Finding("note", "NCCL", f"{_dotted(version)}, not used: it wants a GPU per rank; through host memory")
    else:
        yield Finding("ok", "NCCL", _dotted(version))


def _dotted(version: int) -> str:
    """NCCL's number as people write it: 21903 is 2.19.3, and before 2.9, 2708 was 2.7.8."""
    major = 10_000 if version >= 10_000 else 1000
    return f"{version // major}.{version % major // 100}.{version % 100}"


_OPTIONAL = (
    ("matplotlib", "plots", "curves and traffic as pictures"),
    ("tokenizers", "bpe", "byte-pair encoding (data.tokenizer: bpe)"),
    ("sklearn", "digits", "data.path: digits"),
    ("statsmodels", "survey", "data.path: fair"),
    ("cupy", "cuda", "NVIDIA GPUs"),
)


def _packages() -> Iterator[Finding]:
    for module, extra, use in _OPTIONAL:
        if importlib.util.find_spec(module):
            yield Finding("ok", module, use)
        else:
            yield Finding("note", module, f"not installed: {use}; pip install 'dtrain[{extra}]'")


_CHECKS = (_versions, _mpi, _cores, _blas, _kernels, _folders, _gpus, _packages)
