"""`dtrain bench`: the commands about training steps; those about collectives come from `bench_commands`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dtrain.launch import bench_commands, environment, failures
from dtrain.launch.arguments import CONFIG
from dtrain.launch.help_pages import Group

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=Group)
def bench() -> None:
    """Measure, always as ratios within one run."""


def _counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in value.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise click.BadParameter(f"{value}: must be whole numbers of 1 or more, such as 1,2,8")
    return counts


for _command in bench_commands.COMMANDS:
    bench.add_command(_command)


@bench.command("pipeline")
@click.option(
    "--schedule", "schedules", default="gpipe,1f1b,interleaved,zb_h1,zb_v", show_default=True, help="By commas."
)
@click.option("--stages", default=4, show_default=True, type=click.IntRange(2), help="Ranks of the pipeline.")
@click.option("--microbatches", default=8, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--milliseconds", default=20.0, show_default=True, type=click.FloatRange(0.1), help="Of a forward.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Draw planned and measured time to this SVG.")
def bench_pipeline_command(
    schedules: str, stages: int, microbatches: int, milliseconds: float, output: Path | None
) -> None:
    """Measure the bubble of pipeline schedules beside its formula, and the activations kept.

    Stages are threads of this process, and sleep instead of computing: so they work at the same time on any machine.
    """
    from dtrain.launch.bench_pipeline import bench_pipeline

    names = tuple(schedules.split(","))

    def command() -> None:
        bench_pipeline(names, stages, microbatches, milliseconds / 1e3, output)

    failures.on_rank_0(command)


def _launches(command: F) -> F:
    """The options of what launches jobs in turns."""
    for option in (
        click.option(
            "--json", "json_path", type=click.Path(path_type=Path), help="Write all numbers to this file too."
        ),
        click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Launches of each."),
        click.option("--steps", default=12, show_default=True, type=click.IntRange(1), help="Measured in each."),
        click.option("--peer-python", help="The Python that has the peer; default: this one."),
    ):
        command = option(command)
    return command


@bench.command(
    "step",
    help="Measure the training step: tokens/s, time to the end of the first step, peak memory per rank, and the share "
    f"of its bare matmuls. Starts mpirun itself; one micro-batch and one BLAS thread per rank.\n\n{CONFIG}",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--ranks", default="1,2,8", show_default=True, callback=_counts, help="Numbers of ranks, by commas.")
@click.option(
    "--peer",
    type=click.Choice(["torch", "torch-tuned"]),
    help="Run the same model there too, in turns, and print ratios; tuned: with a fused optimizer and DDP's options.",
)
@_launches
def bench_step(
    config: Path,
    overrides: tuple[str, ...],
    ranks: tuple[int, ...],
    peer: str | None,
    peer_python: str | None,
    steps: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Measure one configuration."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.bench_step import bench_step

    bench_step(loaded, peer, ranks, steps, rounds, json_path, peer_python)


@bench.command(
    "layouts",
    help="Measure the training step in several layouts of the same ranks, beside PyTorch's DDP, "
    f"ZeroRedundancyOptimizer and FSDP2. Starts mpirun itself.\n\n{CONFIG}",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(2), help="How many.")
@click.option("--layouts", help="Names by commas; default: ddp,zero1,zero3,tp2,pp2,dp2tp2pp2.")
@click.option("--peer", type=click.Choice(["torch", "torch-tuned"]), help="PyTorch's counterparts too, in turns.")
@_launches
def bench_layouts(
    config: Path,
    overrides: tuple[str, ...],
    ranks: int,
    layouts: str | None,
    peer: str | None,
    peer_python: str | None,
    steps: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Measure one configuration in several layouts."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.bench_layouts import DEFAULT, bench_layouts

    names = layouts.split(",") if layouts else DEFAULT
    bench_layouts(loaded, names, ranks, peer, steps, rounds, json_path, peer_python)


@bench.command(
    "experts",
    help="Train a mixture of experts and the dense model of as many operations per token on the same samples, and "
    f"print their validation losses and times. On any number of ranks.\n\n{CONFIG}",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="How often, from `seed` on.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all numbers to this file too.")
def bench_experts_command(config: Path, overrides: tuple[str, ...], seeds: int, json_path: Path | None) -> None:
    """Train both."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.collectives import world
    from dtrain.launch.bench_experts import bench_experts

    comm = world()
    environment.check_world(comm.size)
    bench_experts(loaded, comm, seeds, json_path)
