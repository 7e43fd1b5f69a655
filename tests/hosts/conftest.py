"""Two hosts on one machine: network namespaces joined by a veth pair, each with a host name of its own.

    namespace a  10.77.x.1 ── dtrain0 ═══ veth ═══ dtrain0 ── 10.77.x.2  namespace b

MPICH's mpirun reaches both through a script in place of ssh. UCX may use TCP alone, so what the hosts say to one
another crosses the link: the test looks at the bytes that its interface counted. Needs root and iproute2, and MPICH.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

DEVICE = "dtrain0"
SCRIPT = """#!/bin/bash
# In place of ssh: [options] ADDRESS COMMAND...
while [[ "$1" == -* ]]; do shift; done
host=${1##*.}; shift
exec ip netns exec %s$host unshare -u bash -c "hostname dtrain-host$host; $*"
"""


@dataclass(frozen=True)
class Hosts:
    """Both hosts, and how to start ranks on them."""

    name: str
    folder: Path
    mpirun: str

    def run(self, ranks: int, *command: str, limit: int = 240) -> subprocess.CompletedProcess[str]:
        """Run a command on `ranks` ranks, the same number on each host."""
        hostfile = self.folder / "hosts"
        hostfile.write_text("".join(f"{address}:{ranks // 2}\n" for address in self.addresses))
        launch = [self.mpirun, "-launcher", "ssh", "-launcher-exec", str(self.folder / "enter"), "-f", str(hostfile)]
        environment = os.environ | {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": DEVICE, "PYTHONUNBUFFERED": "1"}
        return subprocess.run(
            ["ip", "netns", "exec", f"{self.name}1", *launch, "-iface", DEVICE, "-n", str(ranks), *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )

    @property
    def addresses(self) -> list[str]:
        """Of both hosts."""
        return [f"10.77.{os.getpid() % 250 + 1}.{host}" for host in (1, 2)]

    def bytes_sent(self) -> int:
        """What the first host has sent over the link so far."""
        path = f"/sys/class/net/{DEVICE}/statistics/tx_bytes"
        return int(subprocess.check_output(["ip", "netns", "exec", f"{self.name}1", "cat", path]))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _wait_for_link(name: str) -> None:
    """The kernel needs a moment to see that both ends are up; UCX passes over a device that is not."""
    for _ in range(100):
        state = subprocess.check_output(["ip", "netns", "exec", name, "cat", f"/sys/class/net/{DEVICE}/operstate"])
        if state.strip() == b"up":
            return
        time.sleep(0.05)
    raise RuntimeError(f"the link of {name} does not come up")


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two namespaces, removed in the end."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("two hosts on one machine need root, ip (iproute2) and unshare (util-linux)")
    if mpirun is None or "HYDRA" not in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout:
        pytest.skip("starting ranks in namespaces is written for MPICH's mpirun")
    made = Hosts(f"dtrain-{os.getpid()}-", tmp_path_factory.mktemp("hosts"), mpirun)
    script = made.folder / "enter"
    script.write_text(SCRIPT % made.name)
    script.chmod(0o755)
    try:
        try:
            for host in (1, 2):
                _ip("netns", "add", f"{made.name}{host}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        names = [f"{made.name}{host}" for host in (1, 2)]
        _ip("link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        for name, address in zip(names, made.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        for name in names:
            _wait_for_link(name)
        yield made
    finally:
        for host in (1, 2):
            subprocess.run(["ip", "netns", "del", f"{made.name}{host}"], capture_output=True)
