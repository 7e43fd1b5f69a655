"""The commands `dtrain bench all_reduce|...|p2p|all`: their options and help. `bench_report` does the work."""

from pathlib import Path
from typing import Any

import click

from dtrain.launch.bench_table import COLLECTIVES, IN_PLACE, OUT_OF_PLACE, parse_sizes
from dtrain.launch.bench_wire import parse_rate

_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
    "uint64", "bool", "complex64", "complex128",
)  # fmt: skip
_COLUMNS = """Columns as in nccl-tests: size in bytes (of the whole array; for collectives in blocks, of all blocks
together), elements, dtype, operation, algorithm; then, out of place and in place, the time (median over iterations of
the maximum over ranks, its 10th and 90th percentile), algbw = size / time, busbw (what a link carries, whatever the
number of ranks), bound (the least time that memory allows / time), native (time of the MPI library / time: above 1 is
faster), #wrong (elements, of all checks). Exit code 1 when anything is wrong. docs/benchmarks.md explains them."""


def _command(name: str, summary: str) -> click.Command:
    """`dtrain bench NAME`."""

    def callback(**given: Any) -> None:
        _run(name, **given)

    options = [
        click.Option(
            ["--sizes"],
            default="1K:16M",
            show_default=True,
            help="From:to, or a list by commas; bytes, with K, M, G (powers of 1024).",
        ),
        click.Option(["--factor"], default=4.0, show_default=True, help="From one size to the next."),
        click.Option(
            ["--algorithms"],
            help="Names by commas, or all. Default: auto, native, bare (the MPI library's call without dtrain around "
            "it) and shared (one result for all ranks of the node).",
        ),
        click.Option(["--dtype"], default="float32", show_default=True, type=click.Choice(_DTYPES)),
        click.Option(["--op"], default="sum", show_default=True, type=click.Choice(("sum", "prod", "max", "min"))),
        click.Option(
            ["--iterations"],
            type=click.IntRange(1),
            help="Timed calls of each algorithm and size, in 5 blocks; default: 10 to 500, about 0.15 s.",
        ),
        click.Option(
            ["--warmup"], default=1, show_default=True, type=click.IntRange(1), help="Untimed calls before each block."
        ),
        click.Option(["--in-place", "placing"], flag_value="in", help="Only with the result in the input's place."),
        click.Option(["--out-of-place", "placing"], flag_value="out", help="Only with the result elsewhere."),
        click.Option(["--both", "placing"], flag_value="both", default="both", help="Both; the default."),
        click.Option(
            ["--private"], is_flag=True, help="Arrays in ordinary memory; default: in the node's shared window."
        ),
        click.Option(["--cold"], is_flag=True, help="Take turns among arrays of more than twice the last-level cache."),
        click.Option(
            ["--wire"],
            metavar="RATE",
            help="Over several nodes: what a node can send, as 1gbit; bound is then the least time that it allows.",
        ),
        click.Option(
            ["--latency"],
            is_flag=True,
            help="The columns of the OSU microbenchmarks too: mean latency of all ranks, the fastest and the slowest.",
        ),
        click.Option(["--json", "json_path"], type=click.Path(path_type=Path), help="Write everything to this file."),
        click.Option(["--csv", "csv_path"], type=click.Path(path_type=Path), help="Write the rows to this file."),
        click.Option(
            ["--plot", "plot_path"],
            type=click.Path(path_type=Path),
            help="Draw time and bus bandwidth over size, and the limit of the memory or the wire, as SVG.",
        ),
        click.Option(
            ["--compare", "compare_path"],
            type=click.Path(path_type=Path),
            help="Print the ratio to a run that --json wrote, row by row.",
        ),
        click.Option(
            ["--peer"],
            type=click.Choice(("torch",)),
            help="PyTorch's Gloo takes its turns too, in a process beside each rank: rows of the algorithm gloo.",
        ),
        click.Option(["--peer-python"], help="The Python that has PyTorch; default: this one."),
        click.Option(
            ["--reference", "reference_paths"],
            type=click.Path(path_type=Path),
            multiple=True,
            help="What IMB-MPI1 or an OSU benchmark printed: its times beside ours. May be given several times.",
        ),
    ]
    if name == "p2p":
        options.append(
            click.Option(
                ["--write-cluster", "cluster_path"],
                type=click.Path(path_type=Path),
                help="Write alpha and beta of each class of links to this file, for "
                "dtrain show collective ... --simulate FILE.",
            )
        )
    dropped = {"barrier": {"sizes", "factor", "dtype", "op", "placing", "private", "cold", "plot_path", "wire"}}
    dropped["p2p"] = {"algorithms", "op", "placing", "cold", "peer", "peer_python", "reference_paths", "wire"}
    kept = [option for option in options if option.name not in dropped.get(name, set()) | _without_op(name)]
    return click.Command(
        name, callback=callback, params=list(kept), help=f"Measure {summary}; under mpirun.\n\n{_COLUMNS}",
        short_help=summary[0].upper() + summary[1:] + ".",
    )  # fmt: skip


def _without_op(name: str) -> set[str]:
    return {"op"} if name in COLLECTIVES and not COLLECTIVES[name].reduces else set()


def _run(
    name: str,
    algorithms: str | None = None,
    sizes: str = "8",
    factor: float = 2.0,
    dtype: str = "float32",
    op: str = "sum",
    iterations: int | None = None,
    warmup: int = 1,
    placing: str = "both",
    private: bool = False,
    cold: bool = False,
    latency: bool = False,
    wire: str | None = None,
    json_path: Path | None = None,
    csv_path: Path | None = None,
    plot_path: Path | None = None,
    compare_path: Path | None = None,
    cluster_path: Path | None = None,
    peer: str | None = None,
    peer_python: str | None = None,
    reference_paths: tuple[Path, ...] = (),
) -> None:
    parsed = parse_sizes(sizes, factor)
    from dtrain.launch.bench_collectives import Options  # NumPy and MPI only after the options are known to be right
    from dtrain.launch.bench_report import bench

    options = Options(
        collectives=tuple(COLLECTIVES) if name == "all" else () if name == "p2p" else (name,),
        sizes=parsed,
        algorithms=() if algorithms is None else tuple(part.strip() for part in algorithms.split(",")),
        dtype=dtype,
        op=op,
        placings={"in": (IN_PLACE,), "out": (OUT_OF_PLACE,), "both": (OUT_OF_PLACE, IN_PLACE)}[placing],
        iterations=iterations,
        warmup=warmup,
        private=private,
        cold=cold,
        latency=latency,
        wire=None if wire is None else parse_rate(wire),
    )
    result = bench(
        options,
        name in ("all", "p2p"),
        json_path,
        csv_path,
        plot_path,
        compare_path,
        cluster_path,
        peer=peer == "torch",
        peer_python=peer_python,
        reference_paths=reference_paths,
    )
    if result["wrong"]:
        raise SystemExit(1)


def _overlap(
    collectives: str, sizes: str, factor: float, iterations: int, private: bool, json_path: Path | None
) -> None:
    from dtrain.errors import UserError
    from dtrain.launch import bench_overlap

    names = tuple(part.strip() for part in collectives.split(","))
    wrong = [name for name in names if name not in bench_overlap.COLLECTIVES]
    if wrong:
        raise UserError(f"--collectives: {wrong[0]!r}; allowed: {', '.join(bench_overlap.COLLECTIVES)}")
    bench_overlap.bench(names, parse_sizes(sizes, factor), iterations, private, json_path)


def _tune(collectives: str | None, sizes: str | None, factor: float, quick: bool, output: Path | None) -> None:
    parsed = parse_sizes(sizes or ("1K:4M" if quick else "1K:64M"), 4 * factor if quick else factor)
    from dtrain.launch import bench_tune

    names = bench_tune.CHOOSABLE if collectives is None else tuple(part.strip() for part in collectives.split(","))
    bench_tune.tune(names, parsed, quick, output)


TUNE = click.Command(
    "tune",
    callback=_tune,
    params=[
        click.Option(["--collectives"], help="Names by commas; default: all that have algorithms."),
        click.Option(
            ["--sizes"], help="From:to, or a list by commas; bytes, K, M, G. Default: 1K:64M, with --quick 1K:4M."
        ),
        click.Option(["--factor"], default=4.0, show_default=True, help="From one size to the next; --quick: 4 times."),
        click.Option(["--quick"], is_flag=True, help="All ranks as one group only, fewer sizes, short runs."),
        click.Option(
            ["--output", "-o"],
            type=click.Path(path_type=Path),
            help="Write the table to this file (DTRAIN_TUNING=FILE uses it); default: where every run looks for it, "
            "`tuning` in the cache folder.",
        ),
    ],
    help="Measure all algorithms of all collectives on this machine and write down which is the fastest for which "
    "group of ranks, place and size: what algorithm=auto goes by from then on. Under mpirun, with the number of ranks "
    "to train on: groups of all ranks, and of halves down to pairs. Prints the choice, its time in us, and how much "
    "faster it is than the MPI library and than the built-in choice.",
    short_help="Measure which algorithms are the fastest; auto goes by it.",
)


OVERLAP = click.Command(
    "overlap",
    callback=_overlap,
    params=[
        click.Option(["--collectives"], default="all_reduce", show_default=True, help="Names by commas."),
        click.Option(
            ["--sizes"], default="256K:16M", show_default=True, help="From:to, or a list by commas; bytes, K, M, G."
        ),
        click.Option(["--factor"], default=4.0, show_default=True, help="From one size to the next."),
        click.Option(["--iterations"], default=60, show_default=True, type=click.IntRange(12), help="Timed, of each."),
        click.Option(["--private"], is_flag=True, help="Arrays in ordinary memory; default: in the shared window."),
        click.Option(["--json", "json_path"], type=click.Path(path_type=Path), help="Write everything to this file."),
    ],
    help="Measure how much of a started collective is hidden behind matmuls: compute alone, communication alone, both "
    "together, overlap = 1 - (both - compute) / communication; with the progress thread off and on, in turns. Under "
    "mpirun.",
    short_help="What of a started collective is hidden behind computing.",
)


def _servers(config: Path, overrides: tuple[str, ...], workers: int, servers: int, slow: float, output: Path) -> None:
    from dtrain.launch import configuration, failures
    from dtrain.launch.bench_parameter_server import bench

    configuration.load(config, overrides)
    failures.on_rank_0(lambda: bench(config, overrides, workers, servers, slow, output))


SERVERS = click.Command(
    "ps",
    callback=_servers,
    params=[
        click.Argument(["config"], type=click.Path(path_type=Path)),
        click.Argument(["overrides"], nargs=-1, metavar="[KEY.PATH=VALUE]..."),
        click.Option(["--workers"], default=3, show_default=True, type=click.IntRange(1), help="How many."),
        click.Option(["--servers"], default=1, show_default=True, type=click.IntRange(1), help="How many."),
        click.Option(["--slow"], default=3.0, show_default=True, help="How many times as long worker 0 takes."),
        click.Option(
            ["--output", "-o"],
            type=click.Path(path_type=Path),
            default=Path("runs/bench-ps"),
            show_default=True,
            help="The runs by mode, results.json and losses.svg; those of an earlier call go.",
        ),
    ],
    help="Parameter servers with one slow worker: synchronous, local SGD, bounded staleness and asynchronous, the same "
    "number of gradients each. Prints the time as a ratio to the synchronous run and the losses, and draws all loss "
    "curves in one picture. Starts mpirun itself. CONFIG: such as configs/ps_sync.yaml.",
    short_help="Parameter servers with a slow worker, in all modes.",
)

COMMANDS = [
    TUNE,
    OVERLAP,
    SERVERS,
    *(_command(name, formula.summary) for name, formula in COLLECTIVES.items()),
    _command("p2p", "messages between two ranks, latency and bandwidth of each class of links"),
    _command("all", "all collectives, and messages between two ranks"),
]
