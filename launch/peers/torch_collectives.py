"""Collectives of PyTorch over Gloo: the contestant `gloo` of `dtrain bench COLLECTIVE --peer torch`.

    python torch_collectives.py          once per rank; orders as lines of JSON on stdin, answers on stdout

    {"rank": 0, "size": 8, "host": "127.0.0.1", "port": 0}       ─►  {"port": 40123, "torch": "2.9"}     then {"ready"}
    {"collective": "all_reduce", "count": 262144, "turn": 3, …}  ─►  {"wrong": 0, "seconds": […]} or {"error": "…"}

The same timing and checks as in `bench_contest.py` and `bench_cases.py`, whose patterns are written here once more:
imports nothing of dtrain, so that any interpreter with PyTorch can run it. Between orders it sleeps in a read.
"""

import faulthandler
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

PERIOD = 4093
LIMIT = 120.0  # seconds per order
OPERATIONS = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}
Memory = dict[tuple[int, str, int], list[tuple[torch.Tensor, torch.Tensor]]]


def period(rank: int, turn: int, start: int, op: str) -> Any:
    """Elements start .. start + PERIOD of the array of a rank, as float64; see `bench_cases.Pattern`."""
    noise = np.arange(PERIOD, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    values = {"sum": noise % 8, "prod": 1 + (noise % 4 == 0)}.get(op, noise % 128)
    return np.roll(values.astype(np.float64), -(start + 977 * rank + 131 * turn))


def total(size: int, turn: int, start: int, op: str) -> Any:
    """The same elements of the reduction over all ranks."""
    result = period(0, turn, start, op)
    for rank in range(1, size):
        result = OPERATIONS[op](result, period(rank, turn, start, op))
    return result


def repeated(values: Any, like: torch.Tensor) -> torch.Tensor:
    """The period again and again, as long as `like`."""
    one = torch.from_numpy(values).to(like.dtype)
    return one.repeat(-(-len(like) // PERIOD))[: len(like)]


def call(
    name: str, op: str, first: torch.Tensor, second: torch.Tensor
) -> tuple[Callable[[], Any], torch.Tensor | None]:
    """The collective, and where its result will be; None: not on this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    block = len(first) // size
    reduction = getattr(dist.ReduceOp, {"prod": "PRODUCT"}.get(op, op.upper())) if op else None
    mine = first[:block]
    if name == "barrier":
        return dist.barrier, None
    if name == "all_reduce":
        return (lambda: dist.all_reduce(first, reduction)), first
    if name == "broadcast":
        return (lambda: dist.broadcast(first, 0)), first
    if name == "reduce":
        return (lambda: dist.reduce(first, 0, reduction)), first if rank == 0 else None
    if name == "reduce_scatter":
        return (lambda: dist.reduce_scatter_tensor(second[:block], first, reduction)), second[:block]
    if name == "all_gather":
        return (lambda: dist.all_gather_into_tensor(second, mine)), second
    if name == "all_to_all":
        return (lambda: dist.all_to_all_single(second, first)), second
    if name == "gather":
        parts = list(second.chunk(size)) if rank == 0 else None
        return (lambda: dist.gather(mine, parts, 0)), second if rank == 0 else None
    if name != "scatter":
        raise NotImplementedError(f"PyTorch has no {name}")
    parts = list(first.chunk(size)) if rank == 0 else None
    return (lambda: dist.scatter(second[:block], parts, 0)), second[:block]


def wrong_elements(name: str, result: torch.Tensor | None, order: dict[str, Any]) -> int:
    """How many elements of this rank's result are not what they should be."""
    if result is None:
        return 0
    rank, size, turn, op = dist.get_rank(), dist.get_world_size(), order["turn"], order["op"]
    block = order["count"] // size
    if name in ("gather", "all_gather", "all_to_all"):
        start = rank * block if name == "all_to_all" else 0
        right = torch.cat([repeated(period(q, turn, start, op), result[:block]) for q in range(size)])
    elif name in ("broadcast", "scatter"):
        right = repeated(period(0, turn, rank * block if name == "scatter" else 0, op), result)
    else:
        right = repeated(total(size, turn, rank * block if name == "reduce_scatter" else 0, op), result)
    return int((result != right).sum())


def timed(runs: list[Callable[[], Any]], iterations: int) -> list[float]:
    """Seconds of this rank's calls, all ranks starting together."""
    seconds = []
    gc.disable()
    for iteration in range(iterations):
        run = runs[iteration % len(runs)]
        dist.barrier()
        dist.barrier()
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    gc.enable()
    return seconds


def obey(order: dict[str, Any], memory: Memory) -> dict[str, Any]:
    """One order: a checked run on new data, then timed ones."""
    name, count = order["collective"], order["count"]
    key = (count, order["dtype"], order["places"])
    if key not in memory:
        memory.clear()
        dtype = getattr(torch, order["dtype"])
        memory[key] = [(torch.ones(count, dtype=dtype), torch.ones(count, dtype=dtype)) for _ in range(order["places"])]
    cases = [call(name, order["op"], *pair) for pair in memory[key]]
    runs, result = [run for run, _ in cases], cases[0][1]
    first = memory[key][0][0]
    first[:] = repeated(period(dist.get_rank(), order["turn"], 0, order["op"]), first)
    runs[0]()
    wrong = wrong_elements(name, result, order)
    for _ in range(order["warmup"] - 1):
        runs[0]()
    return {"wrong": wrong, "seconds": timed(runs, order["iterations"])}


def main() -> None:
    """Introduce all ranks to one another, then do what is ordered until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not meet the answers
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    place = json.loads(sys.stdin.readline())
    rank, size = place["rank"], place["size"]
    if rank == 0:
        store = dist.TCPStore(place["host"], 0, size, True, limit, wait_for_workers=False)
        answer({"port": store.port, "torch": torch.__version__})
    else:
        store = dist.TCPStore(place["host"], place["port"], size, False, limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    answer({"ready": True})
    memory: Memory = {}
    for line in sys.stdin:
        faulthandler.dump_traceback_later(LIMIT + 10, exit=True)
        try:
            found = obey(json.loads(line), memory)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
            found = {"error": str(error).splitlines()[0][:200]}  # what Gloo cannot do it says on all ranks alike
        faulthandler.cancel_dump_traceback_later()
        answer(found)


if __name__ == "__main__":
    main()
