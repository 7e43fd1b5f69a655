"""The cache of the compiled kernels. The compiler itself is replaced by a quick one that counts its calls."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.kernels import native

CODE = """
import pathlib, sys, time
from dtrain.kernels import native
def compile(bits):
    with open(sys.argv[1], "a") as calls:
        calls.write("x")
    time.sleep(0.5)
    return b"object code" * bits
native._compile = compile
import llvmlite.binding as llvm
assert native.object_code(32, llvm) == b"object code" * 32
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def llvm() -> Any:
    return pytest.importorskip("llvmlite.binding")


def fake(monkeypatch: pytest.MonkeyPatch, calls: list[int], code: bytes = b"code") -> None:
    def compile(bits: int) -> bytes:
        calls.append(bits)
        return code

    monkeypatch.setattr(native, "_compile", compile)


def test_processes_that_start_together_compile_once(cache: Path, llvm: Any, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    command = [sys.executable, "-c", CODE, str(calls)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    for process in started:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors.decode()
    assert calls.read_text() == "x"
    assert [path.suffix for path in cache.iterdir()] == [".o"]


def test_threads_that_start_together_compile_once(cache: Path, llvm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fake(monkeypatch, calls)
    threads = [threading.Thread(target=native.object_code, args=(64, llvm)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert calls == [64]


def test_a_damaged_file_is_compiled_again(cache: Path, llvm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fake(monkeypatch, calls)
    assert native.object_code(32, llvm) == native.object_code(32, llvm) == b"code"
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + b"?" + whole[41:] if len(whole) > 41 else whole[:-1] + b"?"):
        path.write_bytes(damaged)
        assert native.object_code(32, llvm) == b"code"
        assert path.read_bytes() == whole
    assert calls == [32] * 4


def test_the_key_is_of_source_versions_and_machine(cache: Path, llvm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {native._key(llvm)}
    assert native._key(llvm) in keys
    cache.mkdir(exist_ok=True)
    (cache / "_version.py").write_text("another Numba")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(cache / "__init__.py")))
    keys.add(native._key(llvm))
    monkeypatch.setattr(llvm, "llvm_version_info", (0, 0, 0))
    keys.add(native._key(llvm))
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "abacus")
    keys.add(native._key(llvm))
    monkeypatch.setattr(native, "FOLDER", cache)
    for name in ("philox.py", "constants.py"):
        cache.mkdir(exist_ok=True)
        (cache / name).write_text("")
    keys.add(native._key(llvm))
    assert len(keys) == 5


def test_the_lock_of_a_dead_process_is_removed(cache: Path, llvm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fake(monkeypatch, calls)
    native.object_code(32, llvm)
    (path,) = cache.iterdir()
    path.unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(60)
    lock = path.with_suffix(".lock")
    lock.write_text(f"{dead.pid} {native.socket.gethostname()}")
    assert native.object_code(32, llvm) == b"code"
    path.unlink()
    lock.write_text("1 elsewhere")
    os.utime(lock, (time.time() - 2 * native.WAIT,) * 2)
    assert native.object_code(32, llvm) == b"code"
    assert calls == [32] * 3 and not lock.exists()


def test_a_live_lock_is_waited_for_only_so_long(cache: Path, llvm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fake(monkeypatch, calls)
    native.object_code(32, llvm)
    (path,) = cache.iterdir()
    path.unlink()
    path.with_suffix(".lock").write_text(f"{os.getpid()} {native.socket.gethostname()}")
    monkeypatch.setattr(native, "WAIT", 0.3)
    with pytest.raises(native.Unavailable, match="did not finish"):
        native.object_code(32, llvm)


def test_a_failure_is_told_to_the_others_and_tried_again_later(
    cache: Path, llvm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bits: int) -> bytes:
        raise native.Unavailable("no luck")

    with monkeypatch.context() as patched:
        patched.setattr(native, "_compile", fails)
        with pytest.raises(native.Unavailable, match="no luck"):
            native.object_code(32, llvm)
    calls: list[int] = []
    fake(monkeypatch, calls)
    with pytest.raises(native.Unavailable, match="no luck"):
        native.object_code(32, llvm)
    monkeypatch.setattr(native, "RETRY", 0.0)
    assert native.object_code(32, llvm) == b"code"
    assert calls == [32]


def test_a_folder_that_cannot_be_written(tmp_path: Path, llvm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(native.Unavailable, match="cannot be written"):
        native.object_code(32, llvm)


@pytest.mark.parametrize("missing", ["llvmlite", "numba"])
def test_without_the_compiler_the_reference_runs_with_one_warning(cache: Path, missing: str) -> None:
    code = f"""
import sys, warnings
import numpy as np
sys.modules[{missing!r}] = None
from dtrain import kernels
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        kernels.of(np.ones(2, "f")).softmax(np.ones((2, 2), "f"))
print(len(told), kernels.describe())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("1 reference (plain NumPy): ") and missing in run.stdout, run.stdout + run.stderr


def test_numba_is_not_imported_to_run(llvm: Any) -> None:
    code = """
import sys
import numpy as np
from dtrain import kernels
kernels.of(np.ones(2, "f")).softmax(np.ones((2, 2), "f"))
assert kernels.describe().startswith(("fused", "reference (plain NumPy): DTRAIN_KERNELS")), kernels.describe()
assert "numba" not in sys.modules and "scipy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_the_pages_of_llvm_are_given_back_after_linking(llvm: Any) -> None:
    code = """
import numpy as np
from pathlib import Path
from dtrain import kernels
before = kernels.of(np.ones(2, "f")).softmax(np.ones((2, 2), "f"))
resident = 0
for line in Path("/proc/self/smaps").read_text().splitlines():
    words = line.split()
    if not words[0].endswith(":"):
        counted = "libllvmlite" in line and words[1] == "r-xp"
    elif words[0] == "Rss:" and counted:
        resident += int(words[1])
assert resident < 4000, f"{resident} KiB of LLVM's code are still resident"
kernels.of(np.ones(2)).softmax(np.ones((2, 2)))  # links once more: the pages come back by themselves
"""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc/self/smaps on this system")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr


def test_a_lock_that_cannot_be_written_goes_again(tmp_path, monkeypatch):
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.os, "write", full)
    with pytest.raises(native.Unavailable, match="No space left"):
        native._take(tmp_path / "lock")
    assert not list(tmp_path.iterdir())
