"""`dtrain bench … --latency`: the columns of the OSU microbenchmarks, for who compares with tables of theirs.

    # all_reduce, auto, out-of-place
    # Size      Avg Latency(us)   Min Latency(us)   Max Latency(us)  Iterations
    8                      4.21              4.02              4.40         500

As OSU's programs with `-f`: each rank takes the mean of its own calls; told are the mean of the ranks, the fastest and
the slowest rank. That is not the time of the other table, where each iteration takes as long as its slowest rank and
the median counts: a mean holds every interruption, and a rank that need not wait for others (a root that sends) looks
fast. For messages, one way, it is half a round trip, as in osu_latency.
"""

from collections.abc import Iterator, Sequence

from dtrain.launch.bench_table import Row

TITLES = f"# {'Size':<12}{'Avg Latency(us)':>18}{'Min Latency(us)':>18}{'Max Latency(us)':>18}{'Iterations':>12}"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each collective, algorithm and placing."""
    for key in dict.fromkeys((row.collective, row.algorithm, row.placing) for row in rows):
        yield f"# {', '.join(key)}"
        yield TITLES
        for row in rows:
            if (row.collective, row.algorithm, row.placing) == key:
                yield f"{row.size:<14}{row.avg:>18.2f}{row.fastest:>18.2f}{row.slowest:>18.2f}{row.iterations:>12}"
