# mypy: disable-error-code="no-untyped-call"
"""The innermost loops of shared memory as machine code: sums of many arrays in one pass, copies, waiting.

    sum     y[i] = ((x0[i] + x1[i]) + x2[i]) + ...     256 bytes at a time in registers: each element is read once and
                                                      written once, where NumPy makes a pass over the cache per array
    copy    past the caches by non-temporal stores: what is longer than they are is not read before it is overwritten
    raise   flag = number; wake who sleeps, if with this the last one has come
    await   look at the flags of all -> spin -> yield -> sleep (futex) until somebody wakes us
    read    blocks out of the memory of other processes (`cross_memory.py`)
    meet    a whole collective: raise and await with the sums and copies between them (`meeting.py`)
    short   the same with its record, for what is short; called as a function of Python's own (`small.py`)
    window  the same for what lies in the window; called likewise (`places.py`)
    long    as many meetings as it takes, with their records; called likewise (`long.py`)

Written in LLVM's language and translated when the first communicator with shared memory is made, by llvmlite, which
Numba brings along. Where that is missing, or DTRAIN_MACHINE_CODE=off, NumPy and Python do the same, slower. Sums have
the bits of NumPy's: the same additions in the same order.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtrain.collectives import machine_long, machine_short, machine_window
from dtrain.collectives.machine_reading import reading
from dtrain.collectives.machine_source import loops
from dtrain.collectives.machine_waiting import waiting

# Numbers of the system calls futex and process_vm_readv
CALLS = {("linux", "x86_64"): (202, 310), ("linux", "aarch64"): (98, 270)}

MADV_DONTNEED = 4  # of madvise(2)

Function = Callable[..., int]
Action = tuple[int, int, int, int, int, int, int]
"""The address of a function of `MachineCode.parts`, and its six arguments."""


class MachineCode(NamedTuple):
    """C functions, which release the GIL."""

    sums: dict[str, Function]
    """By the character of the dtype: (inputs, number, outputs, number, bytes, past the caches); addresses of tables of
    addresses."""
    copy: Function
    """(target, source, bytes, past the caches)."""
    raise_flag: Function | None
    """(crew, address of my flag, offset of the flags, number); None where there is no futex."""
    await_flags: Function | None
    """(crew, offset, goal, offset of the signatures or 0, signature, nanoseconds of sleep, 0: none) -> 0 all are there
    and have the signature, r + 1 rank r has another one, -1 not yet."""
    meet: Function | None
    """(crew, address of my words, job, number, byte of the record, stage, nanoseconds of sleep): see `meeting.py`."""
    do: Function
    """(job, word) -> 0, if it went well: one action of a job."""
    short: Callable[[Any], Function] | None
    """(words of a job, an array) -> its function (source, target[, stage]), on arrays; None where there is no futex, or
    the structs of Python and NumPy are not those that `machine_short.py` knows."""
    window: Callable[[Any], Function] | None
    """(words of a head, an array) -> its function (source, target), likewise."""
    long: Callable[[Any], Function] | None
    """(words of a call, an array) -> its function (source, target), likewise."""
    parts: dict[str, int]
    """Addresses of what a job may do, each with six arguments: the sums by the character of the dtype, "copies",
    "swaps", and "reads" and "trades" where there are such system calls."""


@cache
def machine_code() -> MachineCode | None:
    """The functions, translated once per process; None where that is not possible or not wanted."""
    word = os.environ.get("DTRAIN_MACHINE_CODE", "on")
    if word not in ("on", "off"):
        raise ValueError(f"DTRAIN_MACHINE_CODE={word!r}: allowed: on, off")
    if word == "off":
        return None
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    calls = CALLS.get((sys.platform, platform.machine()))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    features = llvm.get_host_cpu_features().flatten()
    machine = target.create_target_machine(llvm.get_host_cpu_name(), features, opt=2)
    text = loops()
    if calls:
        text += waiting(calls[0]) + reading(calls[1])
        text += machine_short.short() + machine_window.window() + machine_long.long()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
    engine.finalize_object()
    _engines.append(engine)
    let_go_of("libllvmlite")

    def function(name: str, arguments: int) -> Any:
        return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(engine.get_function_address(name))

    known = calls is not None and _structs_are_known()
    names = _PARTS | ({"reads": "reads", "trades": "trades"} if calls else {})
    return MachineCode(
        {"f": function("dtrain_sum_float", 6), "d": function("dtrain_sum_double", 6)},
        function("dtrain_copy", 4),
        function("dtrain_raise", 4) if calls else None,
        function("dtrain_await", 6) if calls else None,
        function("dtrain_meet", 7) if calls else None,
        function("dtrain_do", 2),
        _functions(engine.get_function_address("dtrain_short")) if known else None,
        _functions(engine.get_function_address("dtrain_window")) if known else None,
        _functions(engine.get_function_address("dtrain_long")) if known else None,
        {part: engine.get_function_address(f"dtrain_{name}") for part, name in names.items()},
    )


class _Method(ctypes.Structure):
    """PyMethodDef: what Python has to know of a function in C."""

    _fields_ = (("name", ctypes.c_char_p), ("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


_METH_FASTCALL = 0x80  # function(self, array of the arguments, their number)


def _functions(at: int) -> Callable[[Any], Function]:
    """Makes functions of Python out of the one at this address, by what each has as its `self`."""
    method = _Method(b"short", at, _METH_FASTCALL, None)
    _engines.append(method)
    make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.POINTER(_Method), ctypes.py_object, ctypes.c_void_p)
    new = make(("PyCFunction_NewEx", ctypes.pythonapi))
    return lambda job: new(method, job, None)


def _structs_are_known() -> bool:
    """Whether an array lies in memory as `machine_short.py` thinks."""
    array = np.zeros((3, 5), np.int16)[:, 1:3]
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_long) != 8:
        return False

    def word(byte: int, kind: Any = ctypes.c_int64) -> int:
        return int(kind.from_address(id(array) + byte).value)

    return (
        word(machine_short.TYPE) == id(np.ndarray)
        and word(machine_short.DATA) == array.ctypes.data
        and word(machine_short.DIMS, ctypes.c_int32) == array.ndim
        and tuple((ctypes.c_int64 * 2).from_address(word(machine_short.SHAPE))) == array.shape
        and word(machine_window.BASE) == id(array.base)
        and word(machine_short.DTYPE) == id(array.dtype)
        and word(machine_short.FLAGS, ctypes.c_int32) == array.flags.num
    )


_PARTS = {"f": "sum_float", "d": "sum_double", "copies": "copies", "swaps": "swaps"}
_engines: list[Any] = []  # they own the code that the functions point into: kept for the life of the process


def crew_words(addresses: list[int], bell: int, spins: int, yields: int) -> list[int]:
    """What `raise_flag` and `await_flags` get the address of, as int64: the ranks' words, the bell, the patience.

    The bell has two words in shared memory, on a line of their own: how often it rang, and how many sleep.
    """
    return [len(addresses), bell, spins, yields, *addresses]


def let_go_of(library: str) -> None:
    """Give back the pages of a library's code: 30 MB of LLVM that only linking needed. A page used again comes back.

    Code is never written to, so its pages are those of the file. Linux only: elsewhere there is no list of them.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    for line in maps:
        if library in line and " r-xp " in line:
            start, _, end = line.split()[0].partition("-")
            madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(int(end, 16) - int(start, 16)), MADV_DONTNEED)
