"""The command behind `dtrain bench all_reduce|...|all|p2p`: measures on all ranks, prints and writes on rank 0.

header and warnings  ->  rows as they come  ->  footer  ->  comparison with an older run  ->  JSON, CSV, SVG
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.cache import write_atomic
from dtrain.collectives import Communicator
from dtrain.errors import UserError
from dtrain.launch import bench_p2p, bench_peer, bench_reference, bench_step, bench_table, environment
from dtrain.launch.bench_collectives import Options, Outcome, Tell, check, measure
from dtrain.launch.bench_contest import BLOCKS
from dtrain.launch.bench_peer import Peer
from dtrain.launch.bench_reference import Reference
from dtrain.launch.bench_table import Row
from dtrain.launch.versions import versions

_CAP_SYS_PTRACE = 19


def header(comm: Communicator) -> dict[str, Any]:
    """Where and with what is measured."""
    return {
        **bench_step.machine({"mpi": comm.transport.name, **versions(comm)}),
        "ranks": comm.size,
        "nodes": len(set(comm.transport.nodes)),
        "crowded": comm.transport.crowded,
        "cma": cma(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def cma() -> str:
    """Why the kernel may not copy from one process to another; empty: it may, or nothing says otherwise."""
    if sys.platform != "linux":
        return ""
    import ctypes

    word = (ctypes.c_char * 1)()
    place = (ctypes.c_size_t * 2)(ctypes.addressof(word), 1)  # struct iovec: base, length
    read = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if read is None or read(os.getpid(), place, 1, place, 1, 0) != 1:  # its own memory: only a filter forbids that
        return "process_vm_readv is refused"
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
        status = Path("/proc/self/status").read_text()
    except (OSError, ValueError):
        return ""
    rights = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    if scope > 2 or (scope and not rights >> _CAP_SYS_PTRACE & 1):
        return f"kernel.yama.ptrace_scope is {scope}"
    return ""


def warnings(header: dict[str, Any]) -> Iterator[str]:
    """What makes numbers of this machine hard to compare."""
    if header["ranks"] == 1:
        yield "one rank: nothing is exchanged; mpirun -n 2 dtrain bench ..."
        return
    if header["crowded"]:
        yield f"{header['ranks']} ranks on {header['cores']} cores: they take turns, times hold for this machine only"
    if header["cma"]:
        yield f"{header['cma']}: the MPI library may have to copy large messages twice (no CMA)"
    if "MPICH" in header["mpi"] and header["mpi"].endswith("multiple"):
        yield (
            "MPICH's own shared-memory collectives need a lower thread level: measure native also with "
            "MPI4PY_RC_THREAD_LEVEL=serialized"
        )


def bench(
    options: Options,
    p2p: bool = False,
    json_path: Path | None = None,
    csv_path: Path | None = None,
    plot_path: Path | None = None,
    compare_path: Path | None = None,
    cluster_path: Path | None = None,
    tell: Tell = print,
    peer: bool = False,
    peer_python: str | None = None,
    reference_paths: Sequence[Path] = (),
) -> dict[str, Any]:
    """Measure on all ranks of the job, print and write on rank 0; return everything. Collective.

    `peer`: PyTorch's Gloo takes turns, run by `peer_python`. `reference_paths`: what IMB-MPI1 or OSU printed.
    """
    from dtrain.collectives import world

    comm = world()
    environment.check_world(comm.size)
    paths = (json_path, csv_path, plot_path, cluster_path)
    old, references = _prepared(comm, paths, compare_path, reference_paths)
    told = tell if comm.rank == 0 else (lambda text: None)
    found = header(comm)
    check(comm, options)
    if options.wire is not None and found["nodes"] == 1:
        raise UserError("--wire: all ranks are on one node, nothing crosses a wire")
    memory = "private" if options.private or (comm.node is None and comm.levels is None) else "window"
    for text in _header_lines(found, memory, options):
        told(text)
    outcome = Outcome([], {}, [])
    if options.collectives:
        contestant = Peer(comm, peer_python) if peer else None
        try:
            if contestant is not None:
                found["torch"] = contestant.version
                told(f"# gloo: PyTorch {contestant.version}, a process beside each rank; both take turns")
            outcome = measure(comm, options, told, contestant)
        finally:
            if contestant is not None:
                contestant.close()
    links = bench_p2p.measure(comm, options, told) if p2p else []
    rows = outcome.rows + [row for link in links for row in link.rows]
    for text in bench_table.footer(rows):
        told(text)
    for text in _beside(options, outcome.rows, references, peer):
        told(text)
    result = {
        "config": {
            **asdict(options),
            "p2p": p2p,
            "ranks": comm.size,
            "memory": memory,
            "blocks": BLOCKS,
        },
        "header": found,
        "warnings": list(warnings(found)),
        "notes": outcome.notes,
        "memory_bandwidth": [{"size": size, "bytes_per_second": b} for size, b in outcome.bandwidths.items()],
        "links": [link.fit() for link in links],
        "references": [asdict(reference) for reference in references],
        "rows": rows,
        "wrong": sum(row.wrong for row in rows),
    }
    cluster = ""
    if cluster_path is not None:
        cluster, left_out = bench_p2p.cluster_text(comm, links, f"{found['processor']}, {found['mpi']}")
        for text in left_out:
            told(f"# {cluster_path}: without {text}")
    if comm.rank == 0:
        if old is not None:
            for text in bench_table.compare(old, result):
                told(text)
        _write(result, json_path, csv_path, plot_path)
        if cluster_path is not None:
            _write_text(cluster_path, cluster)
    comm.barrier()  # nobody ends the job before everything is written
    return result


def _beside(options: Options, rows: Sequence[Row], references: Sequence[Reference], peer: bool) -> Iterator[str]:
    """The tables of Gloo's times and of the references, beside ours."""
    for collective in options.collectives:
        others = [(each.source, each.times) for each in references if each.collective == collective]
        if peer and (times := bench_reference.times_of(rows, collective, bench_peer.NAME)):
            others.insert(0, ("gloo", times))
        for name, times in others:
            yield from bench_reference.beside(rows, collective, name, times, ("auto", "shared", "native"))


def _prepared(
    comm: Communicator, paths: Sequence[Path | None], compare_path: Path | None, reference_paths: Sequence[Path]
) -> tuple[dict[str, Any] | None, list[Reference]]:
    """The older result and the references, on rank 0; UserError on all ranks where a file cannot be read or written."""
    old, problem = None, ""
    references: list[Reference] = []
    if comm.rank == 0:
        try:
            old = None if compare_path is None else bench_table.read(compare_path)
            references = [each for path in reference_paths for each in bench_reference.read(path, comm.size)]
            for path in paths:
                if path is not None and not os.access(path.parent, os.W_OK):
                    raise UserError(f"{path}: cannot be written: no such folder, or not yours")
        except UserError as error:
            problem = str(error)
    problem = comm.broadcast_object(problem)
    if problem:
        raise UserError(problem)
    return old, references


def _header_lines(header: dict[str, Any], memory: str, options: Options) -> Iterator[str]:
    yield (
        f"# dtrain {header['dtrain']}, {header['mpi']}, NumPy {header['numpy']}; {_plural(header['ranks'], 'rank')} on "
        f"{_plural(header['nodes'], 'node')}, {header['cores']} cores, {header['processor']}"
    )
    where = "private memory" if memory == "private" else "shared windows"
    heat = "cold (more than twice the last-level cache in turn)" if options.cold else "hot"
    limit = "memory" if options.wire is None else "the wire"
    yield (
        f"# arrays in {where}, {heat}; time: median over iterations of the maximum over ranks; bound: least time that "
        f"{limit} allows / time; native: time of native / time"
    )
    for text in warnings(header):
        yield f"# WARNING: {text}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _write(result: dict[str, Any], json_path: Path | None, csv_path: Path | None, plot_path: Path | None) -> None:
    texts: list[tuple[Path, str]] = []
    if json_path is not None:
        texts.append((json_path, bench_table.as_json(result)))
    if csv_path is not None:
        texts.append((csv_path, bench_table.as_csv(result["rows"])))
    if plot_path is not None:
        from dtrain.launch import bench_plot

        texts.append((plot_path, bench_plot.svg(result)))
    for path, text in texts:
        _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
