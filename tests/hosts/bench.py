"""Collectives over two hosts beside the MPI library's own, and beside what the wire allows: `make bench-hosts`.

    python -m tests.hosts.bench --sizes 1M,16M --ranks 8 --rate 1gbit all_reduce reduce_scatter

Two network namespaces joined by a link of a given rate (`namespaces.py`), in which `dtrain bench` runs: algorithms in
turns, the time of an iteration is that of the slowest rank, medians. `wire`: the time in which the link carries what no
algorithm can avoid, one way, headers left out / time. `native`: time of the MPI library / time.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.hosts import namespaces

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "collectives", nargs="*", metavar="collective", default=[], help=f"default: {', '.join(COLLECTIVES)}"
    )
    parser.add_argument("--sizes", default="1M,4M,16M,64M")
    parser.add_argument("--ranks", type=int, default=8, help="of both hosts together")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--algorithms", default="native,hierarchical")
    parser.add_argument("--private", action="store_true", help="arrays from elsewhere, not in the shared window")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces go then, too
    with tempfile.TemporaryDirectory() as folder:
        try:
            with namespaces.hosts(Path(folder)) as hosts:
                hosts.limit(arguments.rate)
                for collective in arguments.collectives or COLLECTIVES:
                    _measure(hosts, arguments, collective, Path(folder) / "rows.json")
        except namespaces.NoHosts as reason:
            sys.exit(str(reason))


def _measure(hosts: namespaces.Hosts, arguments: Any, collective: str, file: Path) -> None:
    words = [str(Path(sys.executable).with_name("dtrain")), "bench", collective, "--json", str(file)]
    words += ["--sizes", arguments.sizes, "--algorithms", arguments.algorithms, "--wire", arguments.rate]
    words += ["--iterations", str(arguments.iterations), *(["--private"] if arguments.private else [])]
    before = hosts.bytes_sent()
    done = hosts.run(arguments.ranks, *words, limit=900)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    sent = hosts.bytes_sent() - before
    print(f"{collective}, {arguments.ranks} ranks on 2 hosts, {arguments.rate}, {sent:,} bytes sent by the first")
    print(f"{'bytes':>12}  {'algorithm':<14}{'arrays':<14}{'ms':>9}{'wire':>8}{'native':>9}{'wrong':>7}")
    rows = json.loads(file.read_text())["rows"]
    for size in sorted({row["size"] for row in rows}):
        of_size = [row for row in rows if row["size"] == size]
        native = min((row["time"] for row in of_size if row["algorithm"] == "native"), default=0.0)
        for row in of_size:
            print(
                f"{size:>12}  {row['algorithm']:<14}{row['placing']:<14}{row['time'] / 1e3:>9.2f}"
                f"{100 * row['bound'] / row['time']:>7.1f}%{native / row['time']:>8.2f}x{row['wrong']:>7}",
                flush=True,
            )


if __name__ == "__main__":
    main()
