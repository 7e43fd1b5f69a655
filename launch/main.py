"""The commands of `dtrain`: their arguments and help. What they do stands in other files, imported when called."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from dtrain import __version__
from dtrain.errors import UserError
from dtrain.launch import bench_commands, environment, failures

_CONFIG = """CONFIG is a YAML file; each key.path=value changes one key of it (the value is YAML), for example
train.steps=20 or 'optimizer={kind: sgd, learning_rate: 0.1}'. `dtrain show config CONFIG` prints all keys."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command; wrong arguments are a UserError."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if environment.job().rank > 0 and {"--help", "--version"} & {*arguments}:
        return  # rank 0 says it
    try:
        cli.main(arguments, prog_name="dtrain", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        if environment.job().rank == 0:
            click.echo(error.ctx.get_help() if error.ctx else error.format_message())
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        more = f"\nSee: {context.command_path} --help" if context else ""
        raise UserError(f"{error.format_message()}{more}") from None
    except click.Abort:
        raise KeyboardInterrupt from None


@click.group(context_settings={"help_option_names": ["--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dtrain")
def cli() -> None:
    """Distributed training on real processes: MPI between the ranks, NumPy arrays inside them.

    \b
    mpirun -n 8 dtrain run configs/gpt_ddp.yaml      train on eight ranks
    dtrain run configs/gpt_ddp.yaml                  the same job on one
    dtrain doctor                                    is everything as it should be?

    Exit codes: 0 done; 1 a fault, with the traceback of the rank that failed first; 2 a mistake in the command
    line, the configuration or the data, told in one message.
    """


@cli.command("run", help=f"Train. Under mpirun or srun on all their ranks, else on one.\n\n{_CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def run_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Load the configuration and train."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.run import run  # NumPy and MPI only after the configuration is known to be right

    run(loaded, config)


@cli.command(
    "verify",
    help="Compare this layout with one process on the same data from the same weights: losses, gradient norms, every "
    "gradient and every parameter, with a verdict for each and the layer where a difference begins. Under mpirun.\n\n"
    f"Exit code 1 when more differs than rounding explains.\n\n{_CONFIG}",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(1), help="How many to train.")
@click.option(
    "--dtype",
    default="float64",
    show_default=True,
    type=click.Choice(["float64", "float32", "bfloat16", "float16", "config"]),
    help="Of both sides; config: that of the configuration.",
)
@click.option("--all", "show_all", is_flag=True, help="Show all tensors, in forward order.")
def verify_command(config: Path, overrides: tuple[str, ...], steps: int, dtype: str, show_all: bool) -> None:
    """Train both and compare."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.verify_report import command

    command(loaded, steps, dtype, show_all)


@cli.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="The text to go on from.")
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(1), help="How many to write.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0: the likeliest.")
@click.option("--top-k", type=click.IntRange(1), help="Draw from so many of the likeliest only.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Another seed, another text.")
def sample(run_folder: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    """Write text with a trained GPT.

    RUN is a folder that `dtrain run` wrote, such as runs/gpt-ddp; its newest checkpoint is used.
    """
    from dtrain.launch.sample import sample

    sample(run_folder, prompt, tokens, temperature, seed, top_k)


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(value[-1:].upper())
    try:
        number = float(value[:-1] if unit else value) * (unit or 1)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise click.BadParameter(f"{value}: must be bytes, with K, M, G or T for powers of 1024, such as 2G")
    return number


@cli.command("plan", help=f"Choose a layout: time and memory of the best ones, and why.\n\n{_CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--ranks", required=True, type=click.IntRange(1), help="How many ranks there are.")
@click.option("--memory", callback=_bytes, help="What a rank may use, such as 2G; default: only time counts.")
@click.option("--per-host", type=click.IntRange(1), help="Ranks on one host; default: all, or the cluster's.")
@click.option("--cores", type=click.IntRange(1), help="Cores of a host; default: this machine's.")
@click.option("--gflops", type=click.FloatRange(0, min_open=True), help="Of a core; default: measured here.")
@click.option("--cluster", type=click.Path(path_type=Path), help="Latencies and bandwidths, as examples/cluster.yaml.")
@click.option("--layers", is_flag=True, help="Choose for every layer how it is cut, instead of degrees for all.")
@click.option("--explain", is_flag=True, help="Time and memory in parts; with --layers: every op.")
@click.option("--count", default=6, show_default=True, type=click.IntRange(1), help="Meshes in the table.")
@click.option("--measure", type=click.IntRange(2), help="Run so many of the layouts here, predicted beside measured.")
def plan_command(
    config: Path,
    overrides: tuple[str, ...],
    ranks: int,
    memory: float | None,
    per_host: int | None,
    cores: int | None,
    gflops: float | None,
    cluster: Path | None,
    layers: bool,
    explain: bool,
    count: int,
    measure: int | None,
) -> None:
    """Print the plan."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.plan import plan

    speed = None if gflops is None else gflops * 1e9
    given = (memory, per_host, cores, speed, cluster)
    if measure and (layers or any(value is not None for value in (per_host, cores, speed, cluster))):
        raise click.UsageError("--measure: runs here; leave out --layers, --per-host, --cores, --gflops and --cluster")
    failures.on_rank_0(lambda: plan(loaded, ranks, *given, explain, count, layers, measure or 0))


@cli.group()
def show() -> None:
    """Show what a configuration means, without training."""


@show.command("config", help=f"Print the whole configuration, defaults written out.\n\n{_CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def show_config(config: Path, overrides: tuple[str, ...]) -> None:
    """Print the resolved YAML."""
    from dtrain.launch import configuration

    text = configuration.dump(configuration.load(config, overrides))
    if environment.job().rank == 0:
        click.echo(text, nl=False)


@show.command("graph", help=f"Draw the graph of one training step: ops, shapes, FLOPs, bytes.\n\n{_CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("graph.svg"), show_default=True, help="The SVG."
)
@click.option("--ranks", default=1, type=click.IntRange(1), help="Cut into a subgraph per rank, and list the messages.")
def show_graph(config: Path, overrides: tuple[str, ...], output: Path, ranks: int) -> None:
    """Write the SVG."""
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


@show.command("mesh", help=f"Show which rank stands where on the mesh, and the groups that communicate.\n\n{_CONFIG}")
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


@cli.group()
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


@bench.command(
    "step",
    help="Measure the training step: tokens/s, time to the end of the first step, peak memory per rank, and the share "
    f"of its bare matmuls. Starts mpirun itself; one micro-batch and one BLAS thread per rank.\n\n{_CONFIG}",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--ranks", default="1,2,8", show_default=True, callback=_counts, help="Numbers of ranks, by commas.")
@click.option(
    "--peer",
    type=click.Choice(["torch", "torch-tuned"]),
    help="Run the same model there too, in turns, and print ratios; tuned: with a fused optimizer and DDP's options.",
)
@click.option("--peer-python", help="The Python that has the peer; default: this one.")
@click.option("--steps", default=12, show_default=True, type=click.IntRange(1), help="Measured steps of each launch.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Launches of each side.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all numbers to this file too.")
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
    f"ZeroRedundancyOptimizer and FSDP2. Starts mpirun itself.\n\n{_CONFIG}",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(2), help="How many.")
@click.option("--layouts", help="Names by commas; default: ddp,zero1,zero3,tp2,pp2,dp2tp2pp2.")
@click.option("--peer", type=click.Choice(["torch", "torch-tuned"]), help="PyTorch's counterparts too, in turns.")
@click.option("--peer-python", help="The Python that has the peer; default: this one.")
@click.option("--steps", default=12, show_default=True, type=click.IntRange(1), help="Measured steps of each launch.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Launches of each.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all numbers to this file too.")
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
    f"print their validation losses and times. On any number of ranks.\n\n{_CONFIG}",
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


@cli.group()
def checkpoint() -> None:
    """List, check, compare and export checkpoints; one process, no MPI.

    CHECKPOINT is a folder such as runs/gpt-ddp/checkpoints/step_00000100, or a run: its newest one.
    """


@checkpoint.command("ls")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
def checkpoint_ls(run_folder: Path) -> None:
    """List the checkpoints of a run: step, size, age, complete or why not."""
    from dtrain.launch.checkpoints import table

    failures.on_rank_0(lambda: click.echo(table(run_folder)))


@checkpoint.command("verify")
@click.argument("folder", metavar="CHECKPOINT", type=click.Path(path_type=Path))
def checkpoint_verify(folder: Path) -> None:
    """Read everything and compare all checksums."""
    from dtrain.launch.checkpoints import verify

    failures.on_rank_0(lambda: click.echo(verify(folder)))


@checkpoint.command("diff")
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
def checkpoint_diff(a: Path, b: Path) -> None:
    """Compare two checkpoints: names, shapes, largest difference per tensor. Exit code 1 when they differ.

    The layouts that wrote them do not matter.
    """
    from dtrain.launch.checkpoints import diff

    def command() -> None:
        equal, text = diff(a, b)
        click.echo(text)
        sys.exit(0 if equal else 1)

    failures.on_rank_0(command)


@checkpoint.command("export")
@click.argument("folder", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", metavar="CHECKPOINT", help="Of LoRA's adapters: where their base is now, if not where it was.")
def checkpoint_export(folder: Path, out: Path, base: str | None) -> None:
    """Write the parameters, whole, to OUT/model.safetensors, and what they are to OUT/config.json.

    LoRA's adapters are added to the parameters of their base.
    """
    from dtrain.launch.checkpoints import export

    failures.on_rank_0(lambda: click.echo(export(folder, out, base)))


@cli.command()
def doctor() -> None:
    """Check MPI, threads, kernels, folders and optional packages; every finding comes with its remedy.

    Alone or under mpirun; exit code 1 when something must be repaired.
    """
    from dtrain.launch.doctor import examine

    sys.exit(0 if examine() else 1)
