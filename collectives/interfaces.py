"""At which address of this machine the other ranks reach it: for sockets, which do not come with a launcher.

    all ranks on one node    127.0.0.1: nobody else can even ask
    several nodes            the address from which the way to another node leads; DTRAIN_INTERFACE overrules it

A machine has several addresses (loopback, containers' bridges, management, the fast network). Each rank says which it
has; those that two nodes both have (bridges are called alike everywhere) name no machine. The system is then asked from
which of its own addresses it would send to the other node: a datagram socket is pointed there, nothing is sent.
"""

import os
import socket
import struct
import sys
from collections.abc import Sequence

LOOPBACK = "127.0.0.1"
_ADDRESS_OF = 0x8915  # SIOCGIFADDR of Linux
_ANY_PORT = 9


def addresses() -> dict[str, str]:
    """Interface -> IPv4 address of this machine, loopback left out."""
    found = {}
    if sys.platform == "linux":
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            for _, name in socket.if_nameindex():
                try:
                    row = fcntl.ioctl(asker.fileno(), _ADDRESS_OF, struct.pack("256s", name.encode()[:15]))
                except OSError:
                    continue  # an interface without an address
                found[name] = socket.inet_ntoa(row[20:24])
    else:
        rows = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        found = {f"address {i}": str(row[4][0]) for i, row in enumerate(rows)}
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def choose(own: dict[str, str], others: Sequence[Sequence[str]], wish: str = "") -> str:
    """The address to listen at; `others`: those of one rank of each other node, `wish`: an interface or an address."""
    if wish:
        address = own.get(wish, wish)
        if address not in own.values():
            told = ", ".join(f"{name} ({address})" for name, address in own.items())
            raise ValueError(f"DTRAIN_INTERFACE={wish!r}: not an interface of {socket.gethostname()}; it has: {told}")
        return address
    if not others:
        return LOOPBACK
    for theirs in (address for each in others for address in each if address not in own.values()):
        source = towards(theirs)
        if source in own.values():
            return source
    raise ConnectionError(
        f"{socket.gethostname()} with {', '.join(own.values()) or 'no address'} has no way to the other nodes: name "
        "the interface in DTRAIN_INTERFACE"
    )


def towards(address: str) -> str:
    """From which of its own addresses this machine would send there; empty: it would not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as pointer:
        try:
            pointer.connect((address, _ANY_PORT))
        except OSError:
            return ""
        return str(pointer.getsockname()[0])


def wished() -> str:
    """What DTRAIN_INTERFACE says."""
    return os.environ.get("DTRAIN_INTERFACE", "")
