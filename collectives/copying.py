"""Copies that avoid the slow case of x86's string instructions.

`rep movsb`, which memcpy takes from 2 KiB on, is 13 times slower where the target lies 1 to 63 bytes after the source
modulo a page (AMD EPYC: 256 KiB in 93 us instead of 7). Arrays made one after another are such pairs: malloc puts 16
bytes between them. There, and there alone, the copy is an element-wise loop of NumPy.

What is longer than the caches is written past them, where there is machine code: memcpy reads the target first, which
is a third of the traffic (32 MiB in 7.0 ms, 4.1 past the caches).
"""

import numpy as np

from dtrain.collectives.dtypes import Array, address
from dtrain.collectives.machine_code import machine_code
from dtrain.collectives.machine_source import STEP

_LONG = 1 << 16  # bytes: below, nothing is gained past the caches
_SHORT = 2048  # bytes: below, memcpy needs no string instruction
_PAGE, _LINE, _WORD = 4096, 64, 8


def copy(target: Array, source: Array, past: bool = False) -> None:
    """Target = source: flat, contiguous, of one length in bytes and one dtype without objects.

    past: past the caches, for what does not fit there or is one of many such copies.
    """
    nbytes = source.nbytes
    code = machine_code() if past and nbytes >= _LONG else None
    if code is not None:
        octets, into = source.view(np.uint8), target.view(np.uint8)
        head = -address(target) % _LINE
        end = head + (nbytes - head) // STEP * STEP
        code.stream(address(into) + head, address(octets) + head, end - head)
        into[:head] = octets[:head]
        into[end:] = octets[end:]
    elif nbytes > _SHORT and 0 < (address(target) - address(source)) % _PAGE < _LINE:
        whole = nbytes // _WORD * _WORD
        octets, into = source.view(np.uint8), target.view(np.uint8)
        np.positive(octets[:whole].view(np.uint64), out=into[:whole].view(np.uint64))
        into[whole:] = octets[whole:]
    else:
        target[...] = source
