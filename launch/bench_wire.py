"""`dtrain bench … --wire RATE`: over several nodes, the least time that the wire allows.

    N nodes, p ranks, n bytes as `dtrain bench` counts them: what a node at least must send, or receive

    all_reduce                       2 (N-1)/N n      its part leaves as a partial sum, and comes back added up
    reduce_scatter, all_gather         (N-1)/N n
    gather, scatter                    (N-1)/N n      at the node of the root
    all_to_all               p/N ranks (N-1)/N n      nothing can be left out
    broadcast, reduce, scans                   n

Headers are left out. Nodes have as many ranks each; the rate is that of one node, in each direction.
"""

from collections.abc import Callable

from dtrain.errors import UserError

LEAST: dict[str, Callable[[int, int], float]] = {
    "all_reduce": lambda nodes, ranks: 2 * (nodes - 1) / nodes,
    "reduce_scatter": lambda nodes, ranks: (nodes - 1) / nodes,
    "all_gather": lambda nodes, ranks: (nodes - 1) / nodes,
    "all_to_all": lambda nodes, ranks: ranks / nodes * (nodes - 1) / nodes,
    "broadcast": lambda nodes, ranks: 1,
    "reduce": lambda nodes, ranks: 1,
    "gather": lambda nodes, ranks: (nodes - 1) / nodes,
    "scatter": lambda nodes, ranks: (nodes - 1) / nodes,
    "scan": lambda nodes, ranks: 1,
    "exscan": lambda nodes, ranks: 1,
    "barrier": lambda nodes, ranks: 0,
}
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def parse_rate(text: str) -> float:
    """Bytes per second of `1gbit`, `100mbit`, as tc writes them; UserError."""
    number, unit = text.strip().lower()[:-4], text.strip().lower()[-4:]
    try:
        rate = float(number) * _UNITS[unit] / 8
    except (ValueError, KeyError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"--wire {text}: no rate; such as 100mbit, 1gbit or 25gbit")
    return rate


def bound(collective: str, size: int, nodes: int, ranks: int, rate: float) -> float:
    """Microseconds that the wire takes at least; rate in bytes per second."""
    return LEAST[collective](nodes, ranks) * size / rate * 1e6
