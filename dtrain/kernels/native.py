# mypy: disable-error-code="no-untyped-call"
"""The compiled kernels in this process: found in the cache or compiled once per machine, loaded without Numba.

    key = hash(source of the kernels, versions of Numba, llvmlite and Python, CPU name and features)
    cache folder / kernels-<key>-float32.o     SHA-256 of the object code (32 bytes), then the object code
                   kernels-<key>-float32.lock  held by the process that compiles; the others wait for the object file

Of many ranks on a machine that start together one compiles, in a process of its own (so Numba's memory is given back).
The object file is written to a temporary name and renamed: a reader sees all of it or nothing; a damaged one does not
match its checksum and is compiled again. Cache folder: `dtrain/cache.py`.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.cache import cache_folder
from dtrain.collectives.machine_code import let_go_of
from dtrain.kernels.compiled.signatures import SIGNATURES

WAIT = 300.0  # seconds that a rank gives a compilation, its own or another's (8 s alone, 50 s on a crowded core)
RETRY = 60.0  # seconds after which a failed compilation is tried again
CHECKSUM = 32  # bytes of SHA-256 in front of the object code
FOLDER = Path(__file__).parent
ARGUMENTS = {
    "P": ctypes.c_void_p,
    "F": ctypes.c_void_p,
    "L": ctypes.c_void_p,
    "I": ctypes.c_int64,
    "D": ctypes.c_double,
}

Function = Callable[..., None]


class Unavailable(Exception):
    """The compiled kernels cannot be had; the message says why."""


def load(bits: int) -> dict[str, Function]:
    """The kernels of float32 or float64 (bits: 32 or 64) by name: C functions, which release the GIL."""
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise Unavailable(f"llvmlite cannot be imported ({error})") from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    code = object_code(bits, llvm)
    # llvmlite's memory manager puts code and constants side by side: their relative addresses have 32 bits.
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    functions: dict[str, Function] = {}
    for name, signature in SIGNATURES.items():
        kinds = [ARGUMENTS[kind] for kind in signature.replace(" ", "")]
        functions[name] = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(f"dtrain_{name}"))
    let_go_of("libllvmlite")
    return functions


_engines: list[Any] = []  # they own the code that the functions point into: kept for the life of the process


def object_code(bits: int, llvm: Any) -> bytes:
    """The object code from the cache; compiled first where it is not there, by one of the processes that ask."""
    path = cache_folder() / f"kernels-{_key(llvm)}-float{bits}.o"
    lock = path.with_suffix(".lock")
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        code = _read(path)
        if code is not None:
            return code
        if _take(lock):
            return _compile_and_store(bits, path, lock)
        _remove_if_stale(lock)
        time.sleep(0.05)
    raise Unavailable(f"another process did not finish {path} within {WAIT:.0f} s")


def _key(llvm: Any) -> str:
    """What the object code depends on."""
    numba = importlib.util.find_spec("numba")  # found, not imported: that would cost more than all of the rest
    if numba is None or numba.origin is None:
        raise Unavailable("numba is not installed")
    digest = hashlib.sha256()
    for source in (*sorted((FOLDER / "compiled").glob("*.py")), FOLDER / "philox.py", FOLDER / "constants.py"):
        digest.update(source.read_bytes())
    digest.update(Path(numba.origin).with_name("_version.py").read_bytes())
    version = ".".join(map(str, llvm.llvm_version_info))
    machine = (llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    digest.update("|".join([version, *machine]).encode())
    return digest.hexdigest()[:16]


def _read(path: Path) -> bytes | None:
    """The object code, or None where there is none or its checksum is wrong."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[CHECKSUM:]
    return code if hashlib.sha256(code).digest() == data[:CHECKSUM] else None


def _take(lock: Path) -> bool:
    """Create the lock file; False where another process has it. Raises Unavailable where the folder cannot be used."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    except OSError as error:
        raise Unavailable(f"the cache folder {lock.parent} cannot be written: {error}") from error
    try:
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
    except OSError as error:  # a full disk
        lock.unlink(missing_ok=True)
        raise Unavailable(f"the cache folder {lock.parent} cannot be written: {error}") from error
    finally:
        os.close(descriptor)
    return True


def _remove_if_stale(lock: Path) -> None:
    """Remove the lock of a process that is gone or of a failure long ago; raise Unavailable for a fresh failure.

    Two processes may both find it stale and both compile: each result is whole, and the same.
    """
    try:
        holder, age = lock.read_text(), time.time() - lock.stat().st_mtime
    except OSError:
        return  # just released
    if holder.startswith(FAILED) and age < RETRY:
        raise Unavailable(holder)
    pid, _, host = holder.partition(" ")
    gone = host == socket.gethostname() and pid.isdigit() and not _alive(int(pid))
    if holder.startswith(FAILED) or gone or age > WAIT:
        lock.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


FAILED = "the kernels did not compile"


def _compile_and_store(bits: int, path: Path, lock: Path) -> bytes:
    """Compile in a process of its own and put the result in place; a failure stays in the lock file for the others."""
    try:
        code = _read(path)  # finished between our look and our lock
        if code is None:
            code = _compile(bits)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
    except (OSError, subprocess.SubprocessError, Unavailable) as error:
        reason = f"{FAILED}: {error}"
        with contextlib.suppress(OSError):  # a full disk: then the others find out for themselves
            lock.write_text(reason)
        raise Unavailable(reason) from error
    except BaseException:
        lock.unlink(missing_ok=True)
        raise
    lock.unlink(missing_ok=True)
    return code


def _compile(bits: int) -> bytes:
    root = str(FOLDER.parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= {"NUMBA_OPT": "0", "NUMBA_DISABLE_JIT": "0", "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(
        [sys.executable, "-m", "dtrain.kernels.compiled.build", str(bits)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=WAIT,
    )
    if finished.returncode != 0:
        last = finished.stderr.decode(errors="replace").strip()[-500:]
        raise Unavailable(f"exit code {finished.returncode}: {last}")
    return finished.stdout
