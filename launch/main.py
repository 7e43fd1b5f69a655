"""The commands of `dtrain`: their arguments and help. What they do stands in other files, imported when called."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from dtrain import __version__
from dtrain.errors import UserError
from dtrain.launch import environment, failures
from dtrain.launch.arguments import CONFIG
from dtrain.launch.bench_group import bench
from dtrain.launch.help_pages import Group
from dtrain.launch.show_commands import show


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


@click.group(cls=Group, context_settings={"help_option_names": ["--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dtrain")
def cli() -> None:
    """Distributed training on real processes: MPI between the ranks, NumPy arrays inside them.

    \b
    mpirun -n 8 dtrain run configs/gpt_ddp.yaml      train on eight ranks
    dtrain run configs/gpt_ddp.yaml                  the same job on one
    dtrain launch -n 8 configs/gpt_ddp.yaml          on eight, started again when a rank is lost
    dtrain doctor                                    is everything as it should be?

    Exit codes: 0 done; 1 a fault, with the traceback of the rank that failed first; 2 a mistake in the command
    line, the configuration or the data, told in one message.
    """


cli.add_command(show)
cli.add_command(bench)


@cli.command("run", help=f"Train. Under mpirun or srun on all their ranks, else on one.\n\n{CONFIG}")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
def run_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Load the configuration and train."""
    from dtrain.launch import configuration

    loaded = configuration.load(config, overrides)
    from dtrain.launch.run import run  # NumPy and MPI only after the configuration is known to be right

    run(loaded, config)


@cli.command(
    "launch",
    help="Start mpirun and train; start it again from the last checkpoint when a rank or a host is lost.\n\n"
    "A restart is for what may pass: a killed rank, a fault, a hang. A mistake in the configuration or the data, "
    "Ctrl-C and SIGTERM end the job. The exit code is that of the last start; mpirun is that of this Python's MPI.\n\n"
    f"{CONFIG}",
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("-n", "--ranks", required=True, type=click.IntRange(1), help="How many to start.")
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(0), help="At most, from one checkpoint.")
@click.option("--delay", default=5.0, show_default=True, type=click.FloatRange(0), help="Seconds before each.")
@click.option("--hosts", type=click.Path(path_type=Path), help="A file of hosts, one a line, as this mpirun wants it.")
@click.option("--mpi", default="", metavar="OPTIONS", help="More options for mpirun, such as '-bind-to core'.")
def launch_command(
    config: Path, overrides: tuple[str, ...], ranks: int, restarts: int, delay: float, hosts: Path | None, mpi: str
) -> None:
    """Run jobs until one has done it."""
    from dtrain.launch.restarts import launch

    sys.exit(launch(config, overrides, ranks, restarts, delay, hosts, mpi))


@cli.command(
    "verify",
    short_help="Compare this layout with one process: losses, gradients, parameters.",
    help="Compare this layout with one process on the same data from the same weights: losses, gradient norms, every "
    "gradient and every parameter, with a verdict for each and the layer where a difference begins. Under mpirun.\n\n"
    f"Exit code 1 when more differs than rounding explains.\n\n{CONFIG}",
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


@cli.command("plan", help=f"Choose a layout: time and memory of the best ones, and why.\n\n{CONFIG}")
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
