"""`dtrain bench experts`: a mixture of experts beside a dense model of as many operations per token, on the same text.

    moe_gpt    router, the k experts that a token meets, gates     the same samples in the same order, optimizer, steps
    its twin   one MLP, so wide that it costs no less              ──► validation losses, seed by seed

Operations per token are counted in the graph of each model's forward, with no token left out; they are linear in the
width of the twin's MLP. What the mixture has more is parameters, of which a token uses a few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import asdict as fields
from msgspec.structs import replace

from dtrain import graph, models
from dtrain.collectives import Communicator
from dtrain.config import Config, GPTConfig, MoEGPTConfig
from dtrain.data import Data
from dtrain.errors import UserError
from dtrain.launch.assembly import assemble, parts
from dtrain.launch.configuration import for_ranks


@dataclass(frozen=True)
class Curve:
    """How one model learned."""

    name: str
    seed: int
    parameters: int
    flops: float
    """Of the forward, per token."""
    losses: dict[int, float]
    """Validation loss after so many steps."""
    seconds: float
    """Per step."""
    dropped: float
    """Share of the choices that found no room, at the last step."""


def bench_experts(
    config: Config, comm: Communicator, seeds: int, json_path: Path | None = None, tell: Callable[[str], None] = print
) -> list[Curve]:
    """Train both with each of the seeds; tell a table on rank 0, and write it to `json_path`. Collective."""
    _check(config)
    data, _ = parts(config, comm)
    twin = dense_twin(config, data)
    if not config.train.validate.every:
        validate = replace(config.train.validate, every=config.train.steps)
        config, twin = (replace(each, train=replace(each.train, validate=validate)) for each in (config, twin))
    say = tell if comm.rank == 0 else lambda line: None
    tokens = config.train.global_batch * twin.model.sequence  # type: ignore[union-attr]
    say(f"{config.train.steps} steps of {tokens:,} tokens on {comm.size} ranks; validation loss after so many steps:")
    curves: list[Curve] = []
    for seed in range(config.seed, config.seed + seeds):
        for name, each in (("dense", twin), ("experts", config)):
            curve = _train(name, replace(each, seed=seed), comm)
            if not curves:
                steps = "".join(f"{step:>9,}" for step in curve.losses)
                say(f"seed  model    parameters  FLOP/token{steps}   ms/step  dropped")
            losses = "".join(f"{loss:>9.4f}" for loss in curve.losses.values())
            say(
                f"{seed:<4}  {name:<7} {curve.parameters:>11,} {curve.flops:>11,.0f}{losses}"
                f"{1e3 * curve.seconds:>10.0f} {100 * curve.dropped:>7.1f}%"
            )
            curves.append(curve)
    ends = [list(curve.losses.values())[-1] for curve in curves]
    gains = [dense - mixture for dense, mixture in zip(ends[::2], ends[1::2], strict=True)]
    lower = sum(gain > 0 for gain in gains)
    say(f"experts are lower by {np.mean(gains):.4f} nats (mean of {seeds} seeds), lower with {lower} of {seeds} seeds")
    if json_path is not None and comm.rank == 0:
        try:
            json_path.write_text(json.dumps([asdict(curve) for curve in curves], indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: {json_path}: cannot be written: {error.strerror}") from None
    return curves


def _check(config: Config) -> None:
    """UserError where there is nothing to compare."""
    if not isinstance(config.model, MoEGPTConfig):
        raise UserError(f"model.kind: {config.model.kind}; dtrain bench experts compares mixtures: allowed: moe_gpt")
    if config.model.moe.router == "expert_choice":
        raise UserError(
            "model.moe.router: expert_choice; looks at later tokens, so its loss says nothing beside that of a model "
            "that does not. Allowed: top"
        )


def dense_twin(config: Config, data: Data) -> Config:
    """The same job with the narrowest dense GPT that has no fewer operations per token."""
    model, parallel = config.model, config.parallel
    assert isinstance(model, MoEGPTConfig)
    kept = {name: value for name, value in fields(model).items() if name in GPTConfig.__struct_fields__}

    def of_width(hidden: int) -> Config:
        dp = parallel.dp if parallel.dp == -1 else parallel.dp * parallel.ep
        dense = GPTConfig(**{**kept, "hidden": hidden})
        return replace(config, model=dense, parallel=replace(parallel, dp=dp, ep=1))

    least, more = (flops_per_token(of_width(hidden), data) for hidden in (1, 2))
    return of_width(1 + math.ceil((flops_per_token(config, data) - least) / (more - least)))


def _train(name: str, config: Config, comm: Communicator) -> Curve:
    """Collective."""
    trainer = assemble(for_ranks(config, comm.size), comm)
    seconds, losses, details = 0.0, {}, {}
    for record in trainer.run():
        seconds += record.step_seconds
        details = record.details
        if record.validation_loss is not None:
            losses[record.step] = record.validation_loss
    dropped = float(np.mean(details.get("dropped", [0.0])))
    flops = flops_per_token(config, trainer.data)
    trainer.mesh.close()
    return Curve(name, config.seed, trainer.num_parameters, flops, losses, seconds / config.train.steps, dropped)


def flops_per_token(config: Config, data: Data) -> float:
    """Counted in the graph of a forward of one sample in one process, where nothing is dropped."""
    model = config.model
    if isinstance(model, MoEGPTConfig):
        model = replace(model, moe=replace(model.moe, capacity=None))
    batch = data.train.batch(np.arange(1))
    loss = models.build(model, data, config.train.dtype, config.seed).loss(batch)
    return graph.capture(loss).flops / batch["inputs"].size
