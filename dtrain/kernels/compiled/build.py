# mypy: disable-error-code="no-untyped-call"
"""The compiler of the kernels: Numba as the front end, LLVM for one object file.

    loops ──Numba──► LLVM IR, not optimised ──+ C entry points──► one module ──LLVM -O3, this CPU──► object file

The entry points are ours: they have plain C signatures and tell LLVM that pointers do not overlap (`noalias`), which
Numba cannot say and without which most loops would not become vector code. So the optimiser has to run after them.
This module needs Numba; what it writes needs only llvmlite (0.08 s to import instead of 0.5 s, a fifth of the memory).
"""

import os
import re
import sys
from typing import Any

os.environ["NUMBA_OPT"] = "0"  # before Numba is imported: LLVM optimises the whole module below

import llvmlite.binding as llvm
import numba
from numba import types

from dtrain.kernels.compiled import attention, elementwise, rows, updates
from dtrain.kernels.compiled.mathematics import FLOAT32, FLOAT64, Mathematics
from dtrain.kernels.compiled.signatures import SIGNATURES

# Sums may be rearranged (else they cannot use vector registers), multiply-adds fused; NaN and infinity stay.
FASTMATH = {"contract", "reassoc", "nsz"}
IR_TYPES = {"P": "ptr noalias", "F": "ptr noalias", "L": "ptr noalias", "I": "i64", "D": "double"}


def object_code(bits: int) -> bytes:
    """All kernels for float32 or float64 (bits: 32 or 64), compiled for this machine."""
    machine = target_machine()
    module = llvm.parse_assembly("")
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    mathematics = {32: FLOAT32, 64: FLOAT64}[bits]
    for name, function in _functions(mathematics).items():
        module.link_in(llvm.parse_assembly(_with_entry_point(function, name, mathematics)))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)  # type: ignore[no-any-return]


def target_machine() -> Any:
    """LLVM's machine for the CPU that this runs on."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(  # not jit=True: it makes every constant of a loop a 64-bit address first
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, reloc="pic"
    )


def _functions(mathematics: Mathematics) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in (rows, attention, elementwise, updates):
        found |= family.kernels_for(mathematics)
    assert found.keys() == SIGNATURES.keys(), found.keys() ^ SIGNATURES.keys()
    return found


def _with_entry_point(function: Any, name: str, mathematics: Mathematics) -> str:
    """The IR of one kernel with an entry point `void name(arguments)` in front of Numba's own calling convention."""
    kinds = SIGNATURES[name].replace(" ", "")
    pointer = types.CPointer(numba.from_dtype(mathematics.real))
    numba_types = {
        "P": pointer,
        "F": types.CPointer(types.float64),
        "L": types.CPointer(types.int64),
        "I": types.int64,
        "D": types.float64,
    }
    compiled = numba.cfunc(types.void(*(numba_types[kind] for kind in kinds)), fastmath=FASTMATH, error_model="numpy")(
        function
    )
    ir = compiled.inspect_llvm()
    native = compiled.native_name.removeprefix("cfunc.")
    # Only the entry point is to be seen from outside; what it does not need (Numba's run time) is then dropped.
    ir = re.sub(r"^define (linkonce_odr )?", "define internal ", ir, flags=re.MULTILINE)
    ir = ir.replace(" = common ", " = internal ").replace(" noinline ", " alwaysinline ")
    parameters = ", ".join(f"{IR_TYPES[kind]} %a{i}" for i, kind in enumerate(kinds))
    arguments = "".join(f", {IR_TYPES[kind].split()[0]} %a{i}" for i, kind in enumerate(kinds))
    return f"""{ir}
define void @dtrain_{name}({parameters}) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @{native}(ptr %result, ptr %exception{arguments})
  ret void
}}
"""


if __name__ == "__main__":
    sys.stdout.buffer.write(object_code(int(sys.argv[1])))
