"""Text from a trained GPT: `dtrain sample RUN --prompt TEXT`, and the sample at the end of a run.

    prompt ──tokenizer──► ids ──► model on the last `sequence` ids ──► logits of the next id ──► draw ──┐
                           ▲────────────────────────────── append ◄────────────────────────────────────┘

The draw of place i depends on (seed, i) alone, so the same checkpoint, prompt and seed give the same text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dtrain import random
from dtrain.arrays import Array, named_dtype
from dtrain.config import Config, GPTConfig
from dtrain.data import Tokenizer
from dtrain.errors import UserError
from dtrain.launch import environment
from dtrain.models import Model
from dtrain.tape import no_grad

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

MOST_GATHERED = 1 << 30  # bytes of parameters that rank 0 takes together for the sample at the end of a run
START = "\n"  # what an empty prompt stands for: a model of text needs something to go on from


def sample(
    run_folder: Path, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0, top_k: int | None = None
) -> None:
    """Print `prompt` and `tokens` tokens more by the newest checkpoint of the run in `run_folder`; UserError."""
    model, tokenizer = load(run_folder)
    text = generate(model, tokenizer, prompt, tokens, temperature, top_k, seed)
    if environment.job().rank > 0:
        return  # every rank has the same text, and the same mistakes
    # A terminal of another encoding shows what it can.
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "utf-8", errors="replace") + b"\n")
    sys.stdout.flush()


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Return `prompt` and `tokens` tokens after it; bytes that are no UTF-8 become U+FFFD.

    `temperature` divides the logits (0: always the likeliest), `top_k` leaves only so many of the likeliest.
    """
    window: int = model.sequence  # type: ignore[attr-defined]  # every model that writes text has one
    ids = tokenizer.encode(prompt or START).tolist()
    given = len(ids)
    with no_grad():
        for i in range(tokens):
            logits = model(np.array([ids[-window:]], dtype=np.int32)).data[0, -1]
            # A vocabulary padded to a round number has ids that mean nothing.
            ids.append(choose(logits[: tokenizer.vocabulary], temperature, top_k, random.generator(seed, "sample", i)))
    return tokenizer.decode(np.array(ids if prompt else ids[given:], dtype=np.int32))


def choose(logits: Array, temperature: float, top_k: int | None, generator: np.random.Generator) -> int:
    """Draw an id from softmax(logits / temperature), logits (V,), among the `top_k` largest; 0: the first largest."""
    logits = np.asarray(logits, dtype=np.float64)
    if temperature == 0:
        return int(logits.argmax())
    allowed = np.arange(len(logits))
    if top_k is not None and top_k < len(logits):
        allowed = np.sort(np.argsort(-logits, kind="stable")[:top_k])  # among equals the lower id stays
    with np.errstate(over="ignore"):  # a tiny temperature: those below the largest are never drawn
        scaled = (logits[allowed] - logits[allowed].max()) / temperature
    sums = np.cumsum(np.exp(scaled))
    # u < sums[-1] keeps the index inside; rounding of u * sums[-1] may not.
    place = np.searchsorted(sums, generator.random() * sums[-1], side="right")
    return int(allowed[min(place, len(allowed) - 1)])


def load(run_folder: Path) -> tuple[Model, Tokenizer]:
    """Return model and tokenizer of a run, with the parameters of its newest complete checkpoint; UserError."""
    from dtrain import checkpoint, models
    from dtrain.data import load_tokenizer

    config = _config(run_folder)
    folder = checkpoint.latest(run_folder / "checkpoints")
    if folder is None:
        raise UserError(
            f"{run_folder / 'checkpoints'}: no complete checkpoint; the run wrote none so far, or its checkpoint.every "
            f"is 0 (here: {config.checkpoint.every}): train again with checkpoint.every=100"
        )
    if not (run_folder / "tokenizer.json").is_file():
        raise UserError(
            f"{run_folder}: trained on data.kind: {config.data.kind}, whose tokens have no text; allowed: text"
        )
    tokenizer = load_tokenizer(run_folder / "tokenizer.json")
    model = models.build(config.model, _Sizes(tokenizer.vocabulary), dtype=config.train.dtype, seed=config.seed)
    reader = checkpoint.Reader(folder)
    parameters = model.named_parameters()
    written: dict[str, Callable[[], Array]] = {n: partial(reader.read, n) for n in reader.names("parameter")}
    if "lora" in reader.state:
        from dtrain.strategies.lora import merged

        written = merged(reader)[1]
    for name, parameter in parameters.items():
        if name not in written:
            raise UserError(f"{folder}: has no tensor {name}; {run_folder / 'config.yaml'} describes another model")
        values = written[name]()
        if values.shape != parameter.shape:
            raise UserError(
                f"{folder}: {name} has shape {values.shape}, but the model of {run_folder / 'config.yaml'} needs "
                f"{parameter.shape}"
            )
        parameter.data = values.astype(parameter.dtype, copy=False)
    model.load_state(reader)
    return model, tokenizer


def assembled(trainer: Trainer) -> Model | None:
    """The model of the trainer on rank 0, such that it runs there alone; None on other ranks. Collective.

    None on all where it is spread over ranks and is too large for one.
    """
    from dtrain import models
    from dtrain.whole import whole_parameters

    if trainer.is_alone:
        return trainer.model if trainer.mesh.comm.rank == 0 else None
    config = trainer.config
    if trainer.num_parameters * named_dtype(config.train.dtype).itemsize > MOST_GATHERED:
        return None
    values = whole_parameters(trainer.flat, trainer.mesh.comm)
    if trainer.mesh.comm.rank != 0:
        return None
    make: dict[str, Callable[[], Array]] = {name: partial(values.__getitem__, name) for name in values}
    if config.lora is not None:
        from dtrain.strategies.lora import added, base_of

        scale = config.lora.alpha / config.lora.rank
        make = added(base_of(config.lora.base), values.__getitem__, set(values), scale)
    model = models.outline(config.model, trainer.data, dtype=config.train.dtype)
    for name, parameter in model.named_parameters().items():
        parameter.data = make[name]()
    for mine, theirs in zip(model.state(), trainer.model.state(), strict=True):
        mine.array[...] = theirs.array
    return model


@dataclass(frozen=True)
class _Sizes:
    """What a model must know of its data."""

    vocabulary: int
    features: int = 0
    tables: tuple[int, ...] = ()


def _config(run_folder: Path) -> Config:
    from dtrain.launch import configuration

    if not (run_folder / "config.yaml").is_file():
        raise UserError(f"{run_folder}: no such run (there is no {run_folder / 'config.yaml'}){_runs(run_folder)}")
    config = configuration.load(run_folder / "config.yaml")
    if not isinstance(config.model, GPTConfig):
        raise UserError(f"{run_folder}: model.kind: {config.model.kind}; only gpt writes text")
    return config


def _runs(run_folder: Path) -> str:
    """Name the runs that there are, in the same folder and where runs usually are."""
    folders = {run_folder.parent, Path("runs")}
    found = sorted(str(path.parent) for folder in folders for path in folder.glob("*/config.yaml"))
    return f"; there are: {', '.join(found[:6])}" if found else "; dtrain run CONFIG makes one"
