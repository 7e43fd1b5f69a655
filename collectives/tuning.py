"""What `auto` takes, measured on this machine: which algorithm is the fastest for a collective, a group and a length.

    mpirun -n 8 dtrain bench tune      measures and writes   ~/.cache/dtrain/tuning/<MPI, processor, version>.json

    (all_reduce, 8 ranks, 1 node, window, 1 MiB)  ─►  measured nearby: its order      window, staged, native, …
                                                  ─►  else the fitted costs           model.py
                                                  ─►  else () and the built-in rule   algorithms.py

An order lists all algorithms from the best to the worst, because the best one may be impossible for an operation or a
dtype. Lengths fall into classes between powers of two, and the answer for a class is looked up once.

Invariant: all ranks of a job choose alike, whatever their hosts have on file. Rank 0 reads, and what it has travels
with the first exchange of `world()`; a group that was split inherits it. Without a file this costs one look at the
folder. A file that is damaged, or was measured with another MPI, processor or version, is ignored with one warning.
DTRAIN_TUNING=FILE names another file, DTRAIN_TUNING=off none.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.collectives.model import Costs, fit
from dtrain.collectives.staged import SMALL_BYTES

if TYPE_CHECKING:
    from dtrain.collectives.call import Call

FORMAT = 1
NEARBY = 2.0  # powers of two between a length and the nearest measured one; what is farther away is not measured
PLACES = ("window", "apart", "private")
"""Where the arrays lie: in the window (an all_reduce: in place), an all_reduce from the window to elsewhere, or in
ordinary memory."""


@dataclass(frozen=True)
class Measured:
    """The times of all algorithms for one length, in microseconds, and their order."""

    collective: str
    ranks: int
    nodes: int
    place: str
    nbytes: int
    times: dict[str, float]
    order: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What a file holds."""

    key: dict[str, str]
    """MPI library, processor, version of dtrain: a table is good for these alone."""
    measured: tuple[Measured, ...]
    costs: Costs
    """Fitted to them where they were measured: floating-point units may differ in a last bit, and a choice with it."""
    source: str = ""
    """Where it was read; not in the file."""
    text: str = field(default="", compare=False, repr=False)
    """Of the file, as it was read: what travels to the other ranks."""

    @classmethod
    def of(cls, key: Mapping[str, str], measured: Sequence[Measured]) -> "Table":
        """The table of these measurements."""
        samples = [
            (row.collective, row.ranks, row.nodes, row.place, row.nbytes, name, time * 1e-6)
            for row in measured
            for name, time in row.times.items()
        ]
        return cls(dict(key), tuple(measured), fit(samples))

    def describe(self) -> str:
        """A line for the log."""
        ranks = sorted({(row.ranks, row.nodes) for row in self.measured})
        groups = ", ".join(f"{size}" + (f" on {nodes} nodes" if nodes > 1 else "") for size, nodes in ranks)
        return f"{self.source}: {len(self.measured)} lengths measured for groups of {groups} ranks"

    def as_json(self) -> str:
        """The text of the file."""
        rows = [{**asdict(row), "order": list(row.order)} for row in self.measured]
        parts = [",\n  ".join(map(json.dumps, part)) for part in (rows, self.costs.rows())]
        head = f'"format": {FORMAT}, "key": {json.dumps(self.key)}'
        return f'{{{head},\n "measured": [\n  {parts[0]}\n ],\n "costs": [\n  {parts[1]}\n ]}}\n'


def parse(text: str, key: Mapping[str, str] | None, source: str = "") -> Table:
    """The table in a file; ValueError says what is wrong with it. key: what it must have been measured with."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"no tuning table of format {FORMAT}")
    if content.get("key") != key and key is not None:
        raise ValueError(f"measured for {content.get('key')}, this is {dict(key)}")
    rows, costs = content.get("measured"), content.get("costs")
    if not isinstance(rows, list) or not isinstance(costs, list):
        raise ValueError("measured and costs: must be lists")
    measured = tuple(_row(number, row) for number, row in enumerate(rows))
    known = [(row.collective, row.ranks, row.nodes, row.place, row.times) for row in measured]
    return Table(content["key"], measured, Costs.read(costs, known), source, text)


def _row(number: int, row: Any) -> Measured:
    place = f"measured[{number}]"
    names = ("collective", "ranks", "nodes", "place", "nbytes", "times", "order")
    if not isinstance(row, dict) or set(row) != set(names):
        raise ValueError(f"{place}: must have the keys {', '.join(names)}")
    if row["place"] not in PLACES or not isinstance(row["collective"], str):
        raise ValueError(f"{place}: collective or place: {row['collective']}, {row['place']}")
    for word in ("ranks", "nodes", "nbytes"):
        if type(row[word]) is not int or row[word] < 1:
            raise ValueError(f"{place}.{word}={row[word]}: must be a whole number from 1")
    times, order = row["times"], row["order"]
    if not isinstance(times, dict) or not all(_positive(time) for time in times.values()):
        raise ValueError(f"{place}.times: must be microseconds by algorithm")
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(times):
        raise ValueError(f"{place}.order: must name the algorithms of times, each once")
    return Measured(**{**row, "times": dict(times), "order": tuple(order)})


def _positive(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number) and number > 0


# --- looking up -------------------------------------------------------------------------------------------------------


class Tuning:
    """A table as one communicator sees it."""

    def __init__(self, table: Table, nodes: Sequence[int]) -> None:
        """nodes: of each rank; equal numbers share memory."""
        self.table, self.ranks, self.nodes = table, len(nodes), len(set(nodes))
        self._known: dict[tuple[str, bool, bool, bool, int], tuple[str, ...]] = {}

    def order(self, collective: str, call: "Call") -> tuple[str, ...]:
        """The algorithms from the best to the worst; (): not known. The same on all ranks."""
        length = _LENGTHS.get(collective)
        nbytes = 0 if length is None else length(call)
        if not nbytes:
            return ()
        key = collective, call.node is None, call.place is None, call.in_place, (nbytes - 1).bit_length()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._look_up(*key)
        return found

    def _look_up(
        self, collective: str, several_nodes: bool, private: bool, in_place: bool, bits: int
    ) -> tuple[str, ...]:
        """For the lengths above 2^(bits - 1) and up to 2^bits bytes."""
        if 1 << bits <= SMALL_BYTES and not several_nodes:
            return ()  # what is short has a way of its own (`shortcuts.py`)
        place = "private" if private else "apart" if collective == "all_reduce" and not in_place else "window"
        middle = bits - 0.5
        wanted = collective, self.ranks, self.nodes, place
        rows = [row for row in self.table.measured if (row.collective, row.ranks, row.nodes, row.place) == wanted]
        nearest = min(rows, key=lambda row: abs(math.log2(row.nbytes) - middle), default=None)
        if nearest is not None and abs(math.log2(nearest.nbytes) - middle) <= NEARBY + 0.5:
            return nearest.order
        return self.table.costs.order(collective, self.ranks, self.nodes, place, 2.0**middle)


def _source(call: "Call") -> int:
    return call.source.nbytes


def _blocks(call: "Call") -> int:
    return sum(call.counts) * call.source.itemsize


# The length in bytes that a table goes by, which all ranks know: that of `dtrain bench`. 0: not all ranks know it.
_LENGTHS: dict[str, Callable[["Call"], int]] = {
    "all_reduce": _source,
    "reduce_scatter": _source,
    "reduce": _source,
    "scan": _source,
    "exscan": _source,
    "all_gather": _blocks,
    "gather": _blocks,
    "scatter": _blocks,
    "all_to_all": lambda call: call.source.nbytes if call.alike else 0,
    "broadcast": lambda call: call.target.nbytes,
}


# --- the file ---------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where tables are kept: `tuning` in the cache folder, by the rule of `dtrain/cache.py`."""
    chosen = os.environ.get("DTRAIN_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "tuning"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dtrain" / "tuning"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain" / "tuning"


def key(library: str, version: str) -> dict[str, str]:
    """What a table depends on. library: MPI and its thread level; version: of dtrain.

    Not the name of the host: the nodes of a cluster share tables, and a job begins on another one each time.
    """
    return {"mpi": library, "processor": _processor(), "dtrain": version}


def _processor() -> str:
    name = os.uname().machine if hasattr(os, "uname") else sys.platform  # `platform` starts a process to know more
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # no such file: another system
        pass
    return f"{name}, {os.cpu_count()} cores"


def path(found: Mapping[str, str]) -> Path:
    """The file for a key: the one that DTRAIN_TUNING names, or one per key in the folder."""
    chosen = os.environ.get("DTRAIN_TUNING", "")
    if chosen and chosen != "off":
        return Path(chosen).expanduser()
    import hashlib  # only where there is a folder of tables

    return folder() / f"{hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]}.json"


def find(library: Callable[[], str], version: str) -> Table | None:
    """The table for this machine, if there is one."""
    chosen = os.environ.get("DTRAIN_TUNING", "")
    try:
        if chosen == "off" or not (chosen or folder().is_dir()):
            return None
    except (OSError, RuntimeError):  # a folder that may not be looked into, or no home
        return None
    found = key(library(), version)
    where = path(found)
    try:
        return parse(where.read_text(encoding="utf-8"), found, str(where))
    except FileNotFoundError:
        if not chosen:
            return None
        problem = "no such file"
    except (OSError, ValueError) as error:
        problem = str(error)
    warnings.warn(f"tuning table {where} is ignored: {problem}. `dtrain bench tune` writes a new one", stacklevel=3)
    return None


def pack(table: Table | None) -> bytes:
    """What rank 0 sends to all ranks."""
    return b"" if table is None else f"{table.source}\n{table.text or table.as_json()}".encode()


def unpack(content: bytes) -> Table | None:
    """The table that rank 0 has."""
    if not content:
        return None
    source, _, text = content.decode().partition("\n")
    return parse(text, None, source)
