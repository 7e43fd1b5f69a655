"""Several hosts on one machine: network namespaces, each with a host name of its own, and links of a chosen speed.

    2 hosts    namespace 1  10.77.x.1 ── dtrain0 ═══ veth ═══ dtrain0 ── 10.77.x.2  namespace 2
    more       every host's dtrain0 leads to a bridge, in one more namespace

MPICH's mpirun reaches them through a script in place of ssh. UCX may use TCP alone, so what the hosts say to one
another crosses the link, and the interfaces count the bytes. Needs root, iproute2 and util-linux, and MPICH.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEVICE = "dtrain0"
MTU = 9000  # as between the nodes of a cluster; frames of 1500 bytes would spend 4.5 % of the wire on headers
SCRIPT = """#!/bin/bash
# In place of ssh: [options] ADDRESS COMMAND...
while [[ "$1" == -* ]]; do shift; done
host=${1##*.}; shift
exec ip netns exec %s$host unshare -u bash -c "hostname dtrain-host$host; $*"
"""


class NoHosts(RuntimeError):
    """Why there can be no hosts on this machine."""


@dataclass(frozen=True)
class Hosts:
    """The hosts, and how to start ranks on them."""

    name: str
    folder: Path
    mpirun: str
    count: int

    def command(self, ranks: int | Sequence[int], *command: str) -> list[str]:
        """The mpirun that starts a command: so many ranks in all, the same number on each host; or per host."""
        per_host = [ranks // self.count] * self.count if isinstance(ranks, int) else list(ranks)
        lines = [(host, count) for host, count in zip(self.addresses, per_host, strict=True) if count]
        hostfile = self.folder / "hosts"
        hostfile.write_text("".join(f"{host}:{count}\n" for host, count in lines))
        launch = [self.mpirun, "-launcher", "ssh", "-launcher-exec", str(self.folder / "enter"), "-f", str(hostfile)]
        inside = ["ip", "netns", "exec", f"{self.name}1"]
        return [*inside, *launch, "-iface", DEVICE, "-n", str(sum(per_host)), *command]

    @property
    def environment(self) -> dict[str, str]:
        """Of the mpirun."""
        return os.environ | {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": DEVICE, "PYTHONUNBUFFERED": "1"}

    def run(self, ranks: int | Sequence[int], *command: str, limit: int = 240) -> subprocess.CompletedProcess[str]:
        """Run a command; see `command`."""
        return subprocess.run(
            self.command(ranks, *command),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )

    @property
    def addresses(self) -> list[str]:
        """Of all hosts."""
        return [f"10.77.{os.getpid() % 250 + 1}.{host}" for host in range(1, self.count + 1)]

    def bytes_sent(self, host: int = 1) -> int:
        """What a host (1, 2, ...) has sent over its link so far, headers included."""
        return int(self._read(host, "statistics/tx_bytes"))

    def _read(self, host: int, what: str) -> str:
        path = f"/sys/class/net/{DEVICE}/{what}"
        return subprocess.check_output(["ip", "netns", "exec", f"{self.name}{host}", "cat", path], text=True)

    def limit(self, rate: str | None) -> None:
        """Let each host send at most so much ("1gbit"; None: no limit).

        The bucket holds more than a packet of TCP segmentation offload, 64 KiB: longer ones are cut, which costs time.
        """
        for host in range(1, self.count + 1):
            queue = f"tc -n {self.name}{host} qdisc replace dev {DEVICE} root"
            _run(f"{queue} pfifo")
            if rate is not None:
                _run(f"{queue} tbf rate {rate} burst 256kb latency 50ms")

    def wait_for_links(self) -> None:
        """The kernel needs a moment to see that both ends are up; UCX passes over a device that is not."""
        for host in range(1, self.count + 1):
            for _ in range(100):
                if self._read(host, "operstate").strip() == "up":
                    break
                time.sleep(0.05)
            else:
                raise RuntimeError(f"the link of {self.name}{host} does not come up")


def _run(words: str, check: bool = True) -> None:
    subprocess.run(words.split(), check=check, capture_output=True)


def _mpirun() -> str:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        raise NoHosts("several hosts on one machine need root, ip (iproute2) and unshare (util-linux)")
    if mpirun is None or "HYDRA" not in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout:
        raise NoHosts("starting ranks in namespaces is written for MPICH's mpirun")
    return mpirun


@contextmanager
def hosts(folder: Path, count: int = 2) -> Iterator[Hosts]:
    """`count` namespaces with their links, removed in the end; NoHosts where that cannot be."""
    made = Hosts(f"dtrain-{os.getpid()}-{count}-", folder, _mpirun(), count)
    script = made.folder / "enter"
    script.write_text(SCRIPT % made.name)
    script.chmod(0o755)
    names = [f"{made.name}{host}" for host in range(1, count + 1)]
    switch = [f"{made.name}switch"] if count > 2 else []
    try:
        try:
            for name in [*names, *switch]:
                _run(f"ip netns add {name}")
        except subprocess.CalledProcessError as error:
            raise NoHosts(f"no network namespaces here: {error.stderr.decode().strip()}") from error
        if switch:
            _run(f"ip -n {switch[0]} link add bridge type bridge")
            _run(f"ip -n {switch[0]} link set bridge up")
        for host, (name, address) in enumerate(zip(names, made.addresses, strict=True), 1):
            pair = f"ip link add {DEVICE} netns {name} type veth peer name"
            if switch:
                _run(f"{pair} port{host} netns {switch[0]}")
                _run(f"ip -n {switch[0]} link set port{host} master bridge mtu {MTU} up")
            elif host == 1:
                _run(f"{pair} {DEVICE} netns {names[1]}")
            _run(f"ip -n {name} addr add {address}/24 dev {DEVICE}")
            _run(f"ip -n {name} link set {DEVICE} mtu {MTU} up")
            _run(f"ip -n {name} link set lo up")
            network = address.rpartition(".")[0] + ".0/24"
            # Cubic, the usual one, is steadier than others here; where the kernel does not have it, its own will do.
            _run(f"ip -n {name} route replace {network} dev {DEVICE} src {address} congctl cubic", check=False)
        made.wait_for_links()
        yield made
    finally:
        for name in [*names, *switch]:
            _run(f"ip netns del {name}", check=False)
