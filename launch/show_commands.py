"""The commands of `dtrain show`: their arguments and help; what they draw stands in other files."""

from pathlib import Path

import click

from dtrain.launch import environment, failures
from dtrain.launch.arguments import CONFIG
from dtrain.launch.help_pages import Group


@click.group(cls=Group)
def show() -> None:
    """Show what a configuration means, without training."""


@show.command("config", help=f"Print the whole configuration, defaults written out.\n\n{CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def show_config(config: Path, overrides: tuple[str, ...]) -> None:
    """Print the resolved YAML."""
    from dtrain.launch import configuration

    text = configuration.dump(configuration.load(config, overrides))
    if environment.job().rank == 0:
        click.echo(text, nl=False)


@show.command("graph", help=f"Draw the graph of one training step: ops, shapes, FLOPs, bytes.\n\n{CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("graph.svg"),
    show_default=True,
    help="A .svg, .json or .dot.",
)
@click.option("--ranks", default=1, type=click.IntRange(1), help="Cut into a subgraph per rank, and list the messages.")
def show_graph(config: Path, overrides: tuple[str, ...], output: Path, ranks: int) -> None:
    """Write the picture."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.show import graph

    failures.on_rank_0(lambda: graph(loaded, output, ranks))


def _assignments(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, int]:
    pairs = [part.partition("=") for part in value]
    try:
        return {key: int(number) for key, _, number in pairs}
    except ValueError:
        raise click.BadParameter(f"{' '.join(value)}: must be KEY=NUMBER, such as segments=8") from None


@show.command("mesh", help=f"Show which rank stands where on the mesh, and the groups that communicate.\n\n{CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--ranks", required=True, type=click.IntRange(1), help="How many ranks there are.")
@click.option("--per-host", type=click.IntRange(1), help="How many of them one host has; default: all.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the picture to this SVG.")
def show_mesh(config: Path, overrides: tuple[str, ...], ranks: int, per_host: int | None, output: Path | None) -> None:
    """Print it."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.show_mesh import show_mesh

    failures.on_rank_0(lambda: show_mesh(loaded, ranks, per_host, output))


@show.command("collective")
@click.argument("collective")
@click.option("--algorithm", default="all", show_default=True, help="One, or with --simulate several, by commas.")
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--root", default=0, show_default=True, type=click.IntRange(0), help="The root, where there is one.")
@click.option("--set", "parameters", multiple=True, callback=_assignments, metavar="KEY=NUMBER", help="As segments=8.")
@click.option("--simulate", type=click.Path(path_type=Path), metavar="CLUSTER.yaml", help="Time it on this cluster.")
@click.option("--sizes", default="1K:1G", show_default=True, help="Bytes to simulate, such as 1K:1G or 4K,1M.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the picture to this SVG.")
def show_collective(
    collective: str,
    algorithm: str,
    ranks: int,
    root: int,
    parameters: dict[str, int],
    simulate: Path | None,
    sizes: str,
    output: Path | None,
) -> None:
    """Show how a COLLECTIVE such as all_reduce works: who sends what to whom in which step, proven to be right.

    With --simulate, how long its algorithms take on a cluster, and from which size on which one is the fastest.
    examples/cluster.yaml describes such a cluster.
    """
    from dtrain.launch.show_collective import show_collective

    failures.on_rank_0(lambda: show_collective(collective, algorithm, ranks, parameters, root, simulate, sizes, output))


def _durations(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, float]:
    pairs = [part.partition("=") for part in value]
    try:
        return {kind: float(number) for kind, _, number in pairs}
    except ValueError:
        raise click.BadParameter(f"{' '.join(value)}: must be KIND=NUMBER, such as B=2") from None


@show.command("pipeline")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--ranks", type=click.IntRange(1), help="With CONFIG: how many ranks there are.")
@click.option("--schedule", help="A name, FILE.csv or FILE.py:FUNCTION; default: all of ours.")
@click.option("--stages", type=click.IntRange(1), help="Ranks of the pipeline; default: 4.")
@click.option("--microbatches", type=click.IntRange(1), help="How many; default: 8.")
@click.option("--chunks", type=click.IntRange(1), help="Stages per rank, where the schedule leaves a choice.")
@click.option("--seconds", multiple=True, callback=_durations, metavar="KIND=NUMBER", help="Time of F, B, I or W.")
@click.option("--transfer", default=0.0, show_default=True, type=click.FloatRange(0), help="Time between two ranks.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the picture to this SVG.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write the actions to this file, a row per rank.")
def show_pipeline(
    config: Path | None,
    overrides: tuple[str, ...],
    ranks: int | None,
    schedule: str | None,
    stages: int | None,
    microbatches: int | None,
    chunks: int | None,
    seconds: dict[str, float],
    transfer: float,
    output: Path | None,
    csv: Path | None,
) -> None:
    """Show which rank runs which forward and backward when: checked, timed, with its bubble and its memory.

    Without --schedule all schedules are compared. With CONFIG and --ranks it is the pipeline of that run, with the
    blocks of each stage.
    """
    asked = {"schedule": schedule, "stages": stages, "microbatches": microbatches, "chunks": chunks}
    loaded = None
    if config is not None:
        from dtrain.launch import configuration

        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise click.UsageError(
                f"--{given[0]}: CONFIG says it; allowed instead: a key.path=value such as parallel.pp=4"
            )
        if ranks is None:
            raise click.UsageError("--ranks: missing; with CONFIG it says how many ranks there are")
        loaded = configuration.load(config, overrides)
    elif ranks is not None:
        raise click.UsageError("--ranks: goes with CONFIG; without one --stages says how many ranks the pipeline has")
    from dtrain.launch import show_pipeline as show

    def command() -> None:
        if loaded is not None and ranks is not None:
            show.of_config(loaded, ranks, seconds, transfer, output, csv)
        else:
            show.show_pipeline(
                schedule or "all", stages or 4, microbatches or 8, chunks, seconds, transfer, output, csv
            )

    failures.on_rank_0(command)
