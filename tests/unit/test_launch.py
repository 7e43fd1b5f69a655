"""The command line, what the launcher tells, and the cache folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dtrain import cache
from dtrain.errors import UserError
from dtrain.launch import environment, main
from dtrain.launch.environment import Job

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "gpt_ddp.yaml")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_")):
            monkeypatch.delenv(name)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(command: click.Command, name: str = "") -> list[str]:
    """Every command and group below, by what a user types after `dtrain`."""
    inner = getattr(command, "commands", {})
    return [name, *(each for part in inner for each in commands(inner[part], f"{name} {part}".strip()))]


COMMANDS = commands(main.cli)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    main.run([*command.split(), "--help"])
    told = capsys.readouterr().out
    assert told.startswith(f"Usage: dtrain{' ' if command else ''}{command} ")
    options = re.findall(r"^  (--\S+).*\n?", told, re.MULTILINE)
    assert "--help" in options
    for line in re.findall(r"^  --.*", told, re.MULTILINE):
        assert len(line.split()) > 1, f"no help: {line}"


def test_the_commands_of_the_contract_are_there():
    assert {"run", "launch", "sample", "show config", "show graph", "bench step", "doctor"} <= set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", CONFIG, "--steps"], "No such option"),
        (["sample", "x", "--tokens", "0"], "x>=1"),
        (["show", "config", "none.yaml"], "none.yaml: no such file"),
        (["launch", CONFIG], "Missing option '-n'"),
        (["launch", "-n", "2", CONFIG, "optimizer.learning_rte=1"], "did you mean learning_rate?"),
        (["launch", "-n", "2", CONFIG, "parallel.tp=3"], "parallel.tp: 3; does not fit 2 ranks"),
    ],
)
def test_wrong_arguments_are_mistakes_of_the_user(arguments, told):
    with pytest.raises(UserError, match=re.escape(told)):
        main.run(arguments)


def test_show_config_prints_what_can_be_loaded(capsys, tmp_path):
    main.run(["show", "config", CONFIG, "train.steps=3"])
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    main.run(["show", "config", str(tmp_path / "shown.yaml")])
    again = capsys.readouterr().out
    assert again == (tmp_path / "shown.yaml").read_text()
    assert "  steps: 3\n" in again


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    for arguments in ([], ["--help"], ["run", "--help"], ["--version"], ["show", "config", CONFIG]):
        main.run(arguments)
    assert capsys.readouterr().out == ""


def imported(code: str) -> set[str]:
    """The modules that a fresh Python has after `code`."""
    source = f"{code}\nimport sys; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_imports_are_cheap():
    heavy = {"numpy", "mpi4py", "numba", "rich", "matplotlib"}
    assert not heavy & imported("import dtrain, dtrain.config, dtrain.launch.main, dtrain.launch.configuration")
    assert not (heavy | {"click", "msgspec", "yaml"}) & imported("import dtrain.launch.__main__")
    assert "mpi4py" not in imported("import dtrain.collectives")


@pytest.mark.parametrize("name", ["collectives", "strategies", "launch"])
def test_bare_names_are_refused(name):
    run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert f"ImportError: import dtrain.{name}, not {name}" in run.stderr


def test_doctor_finds_its_way():
    run = subprocess.run([sys.executable, "-m", "dtrain.launch", "doctor"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    names = [line.split()[1] for line in run.stdout.splitlines()]
    assert {"dtrain", "MPI", "ranks", "mpirun", "cores", "BLAS", "kernels", "cache"} <= set(names)


def test_doctor_tells_what_must_be_repaired(tmp_path):
    (tmp_path / "file").write_text("")
    env = {**os.environ, "DTRAIN_CACHE": str(tmp_path / "file" / "cache")}
    run = subprocess.run([sys.executable, "-m", "dtrain", "doctor"], capture_output=True, text=True, env=env)
    assert run.returncode == 1
    assert re.search(r"FAIL +cache .*set DTRAIN_CACHE", run.stdout), run.stdout
    assert run.stderr == ""


# --- the launcher and the cores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, Job()),
        ({"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}, Job("Hydra (MPICH, Intel MPI)", 3, 8, 4)),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, Job("Hydra (MPICH, Intel MPI)", 3, 8, 8)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Job("Open MPI", 1, 4, 2),
        ),
        (  # srun: nodes with 2, 2 and 1 tasks; this is on the third
            {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NODEID": "2"}
            | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
            Job("SLURM (srun)", 4, 5, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Job()),  # a batch script, not a step
        (  # mpirun inside a SLURM job
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "5", "PMI_SIZE": "6"},
            Job("Hydra (MPICH, Intel MPI)", 5, 6, 6),
        ),
    ],
)  # fmt: skip
def test_what_the_launcher_says(variables, job):
    assert environment.job(variables) == job


@pytest.mark.parametrize(
    ("cores", "own", "ranks", "threads"),
    [(8, False, 1, 8), (8, False, 3, 2), (2, False, 8, 1), (4, True, 8, 4), (1, True, 8, 1)],
)  # fmt: skip
def test_a_fair_share_of_the_cores(monkeypatch, cores, own, ranks, threads):
    monkeypatch.setattr(environment, "cores", lambda: cores)
    monkeypatch.setattr(environment, "own_cores", lambda: own)
    monkeypatch.setattr(environment, "job", lambda: Job("test", 0, ranks, ranks))
    assert environment.blas_threads() == threads


def test_cores_are_own_where_the_mask_is_smaller_than_the_parents(monkeypatch):
    masks = {0: {0, 1}, os.getppid(): {0, 1, 2, 3}}
    monkeypatch.setattr(environment, "_mask", masks.get)
    assert environment.own_cores()
    assert environment.cores() <= 2
    masks[0] = masks[os.getppid()]
    assert not environment.own_cores()
    masks.clear()  # macOS
    assert not environment.own_cores()
    assert environment.cores() >= 1


def test_threads_of_the_user_stay(monkeypatch):
    for name in environment.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "blas_threads", lambda: 5)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    environment.set_blas_threads()
    assert (os.environ["MKL_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == ("3", "5")
    for name in environment.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    environment.set_blas_threads()
    assert {os.environ[name] for name in environment.THREAD_VARIABLES} == {"2"}


def test_a_launcher_of_another_mpi_is_told(monkeypatch):
    monkeypatch.setattr(environment, "job", lambda: Job("Open MPI", 0, 8, 8))
    environment.check_world(8)
    with pytest.raises(UserError, match=r"Open MPI started 8 processes.* sees 1"):
        environment.check_world(1)


# --- the cache folder -------------------------------------------------------------------------------------------------


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("DTRAIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.cache_folder() == tmp_path / ".cache" / "dtrain"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.cache_folder() == tmp_path / "Library" / "Caches" / "dtrain"


def test_a_file_is_written_whole_over_what_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"one", b"three"):
        cache.write_atomic(path, content)
        assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.write_atomic(tmp_path / "file", b"one")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="DTRAIN_CACHE"):
        cache.check_writable(tmp_path / "file" / "cache")
