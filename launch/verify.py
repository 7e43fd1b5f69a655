"""`dtrain verify`: the layout of a configuration beside one process, tensor by tensor.

    rank 0      reference: one process, no strategies ──► losses, norms, gradients, parameters ─┐ one tensor at a time
    all ranks   the layout, n steps on the same data ───► what each rank holds of them ─────────┴─► largest difference

Both begin with the same weights and see the same samples, because these depend on the seed alone. They may differ by
rounding only, and `Tolerance` says by how much. Of what differs more, the place where it began is named: during the
first step everything that flows out of the blocks is measured (`Probe`), and its gradients are compared before
anything was updated, so a mistake has not spread yet.

Invariant: no tensor is gathered. Rank 0 sends its own around, every rank compares the blocks that it holds, and the
blocks of all ranks must cover the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from msgspec.structs import replace

from dtrain.arrays import Array, named_dtype
from dtrain.collectives import Communicator
from dtrain.config import Config, ValidateConfig
from dtrain.errors import UserError
from dtrain.flat_group import Block
from dtrain.launch import assembly, configuration
from dtrain.launch.verify_finding import diverged, finding
from dtrain.launch.verify_reference import Reference, Tensors, gradients, parameters, probed, unprobed
from dtrain.manifest import Box, check_tiling
from dtrain.trainer import Trainer

OPERATIONS = 10  # of a block, one after the other, in its forward and its backward
SAFETY = 4.0
PACK = 1 << 20
LEAST_SCALE = 1e-3  # of the largest of all gradients: below, a tensor is compared with that instead of its own largest


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference that rounding can explain, and how it comes about."""

    relative: float
    because: str

    @classmethod
    def of(cls, config: Config, steps: int) -> Tolerance:
        """Rounding errors add up like a random walk: over the terms of the longest sum (all targets of a batch) and the
        operations that a gradient goes through; linearly over steps. Sums are in float32 at least, where the terms do
        not count beside the rounding of half-precision results."""
        dtype = config.train.dtype
        unit = float(ml_dtypes.finfo(named_dtype(dtype)).eps) / 2  # type: ignore[no-untyped-call]
        wide = min(unit, float(np.finfo(np.float32).eps) / 2)
        terms = config.train.global_batch * getattr(config.model, "sequence", 1)
        hidden = getattr(config.model, "hidden", None)
        layers = getattr(config.model, "layers", len(hidden) if isinstance(hidden, tuple) else 4)
        row = OPERATIONS * (layers + 1) + config.train.global_batch // config.train.micro_batch
        relative = SAFETY * steps * (wide * math.sqrt(terms * row) if unit == wide else unit * math.sqrt(row))
        counted = f"{terms} terms x {row} operations in a row" if unit == wide else f"{row} roundings in a row"
        return cls(relative, f"{SAFETY:g} x {steps} steps x {unit:.1e} ({dtype}) x sqrt({counted})")


@dataclass(frozen=True)
class Row:
    """The verdict about one number of every step, or one tensor."""

    kind: str
    """loss, grad_norm, gradient 1 (of the first step), gradient n, parameter."""
    name: str
    difference: float
    """The largest of any element."""
    scale: float
    """What it is to be compared with."""
    excess: float
    """The largest difference / what is allowed for that element: right up to 1."""

    @property
    def right(self) -> bool:
        """Whether rounding explains the difference; no number is not right."""
        return self.excess <= 1


@dataclass
class Report:
    """What came out; the same on all ranks."""

    steps: int
    tolerance: Tolerance
    rows: list[Row]
    finding: str | None
    """Where it began, if something is wrong."""

    @property
    def right(self) -> bool:
        """Whether the layout computes what one process does."""
        return all(row.right for row in self.rows)


def verify(
    config: Config, comm: Communicator, steps: int = 3, tolerance: Tolerance | None = None,
    reference: Reference | None = None,
) -> Report:  # fmt: skip
    """Compare the layout of `config` on the ranks of `comm` with one process, over `steps` steps. Collective.

    reference: one that was trained before, of the same configuration (asked for on rank 0). A UserError says what does
    not fit the ranks, or cannot be compared.
    """
    config = comparable(configuration.for_ranks(config, comm.size), steps)
    tolerance = tolerance or Tolerance.of(config, steps)
    trainer = assembly.assemble(config, comm)
    if comm.broadcast_object(reference is None):
        if comm.rank == 0:
            reference = Reference.train(config, steps, after_step=lambda: comm.barrier())
        else:
            for _ in range(steps):  # nobody waits longer than for a step: that would be a hang
                comm.barrier()
    report = _compare(trainer, reference if comm.rank == 0 else None, steps, tolerance)
    trainer.mesh.close()
    return report


def comparable(config: Config, steps: int) -> Config:
    """The configuration of both sides: nothing but training. UserError where rounding is not the only difference."""
    compression = config.parallel.compression.kind
    if compression != "none":
        raise UserError(
            f"parallel.compression.kind: {compression}; loses what it does not send, so it never equals one process. "
            "To verify the rest of the layout add 'parallel.compression={kind: none}'"
        )
    train = replace(config.train, steps=max(steps, config.train.steps), validate=ValidateConfig(every=0))
    return replace(config, train=train)


def _compare(trainer: Trainer, reference: Reference | None, steps: int, tolerance: Tolerance) -> Report:
    """`reference`: on rank 0 only. Collective."""
    comm = trainer.mesh.comm
    relative = tolerance.relative
    scalars: list[tuple[float, float]] = comm.broadcast_object(reference.records if reference else None)
    rows, began = [], None
    sums = probed(trainer)
    for step in range(steps):
        record = trainer.train_step()
        for kind, mine, expected in zip(
            ("loss", "grad_norm"), (record.loss, record.grad_norm), scalars[step], strict=True
        ):
            difference = float(comm.all_reduce(np.array([_size(mine - expected)]), op="max")[0])
            scale = abs(expected)
            rows.append(Row(kind, f"step {step + 1}", difference, scale, _excess(difference, relative * scale)))
        if step == 0:
            unprobed(trainer)
            began = diverged(trainer, sums, reference, relative)
            rows += _tensors(trainer, "gradient 1", gradients(trainer), reference, relative)
    rows += _tensors(trainer, f"gradient {steps}", gradients(trainer), reference, relative) if steps > 1 else []
    rows += _tensors(trainer, "parameter", parameters(trainer), reference, relative)
    order = comm.broadcast_object(list(reference.values) if reference else None)
    wrong = any(not row.right for row in rows)
    return Report(steps, tolerance, rows, finding(rows, began, order) if wrong else None)


def _tensors(
    trainer: Trainer, kind: str, blocks: Iterator[Block], reference: Reference | None, relative: float
) -> Iterator[Row]:
    """A row for each tensor of the reference. Collective."""
    comm = trainer.mesh.comm
    held: dict[str, list[Block]] = {}
    for block in blocks:
        held.setdefault(block.name, []).append(block)
    expected = {} if reference is None else _expected(kind, reference)
    names: list[tuple[str, list[int]]] = comm.broadcast_object([(name, [*v.shape]) for name, v in expected.items()])
    largest = max((float(np.abs(v).max(initial=0)) for v in expected.values()), default=0.0)
    largest = comm.broadcast_object(largest)
    found: dict[str, tuple[float, float, list[Box]]] = {}
    scales: dict[str, float] = {}
    for pack in _packs(names):
        values = _sent(comm, pack, lambda name: expected[name])
        extras = _sent(comm, pack, lambda name: _adapted(name, reference, relative)) if kind == "parameter" else {}
        for name, value in values.items():
            scales[name] = max(float(np.abs(value).max(initial=0)), LEAST_SCALE * largest)
            limits = relative * scales[name] + extras.get(name, np.zeros_like(value))
            found[name] = _largest(held.pop(name, []), value, limits)
    assert not held, f"{', '.join(held)}: one process has no such parameters"
    everyone = comm.all_gather_object(found)
    for name, shape in names:
        parts = [each[name] for each in everyone]
        covered = {(tuple(start), tuple(stop)) for *_, mine in parts for start, stop in mine if 0 not in shape}
        excess = max(part[1] for part in parts)
        try:
            check_tiling(name, shape, sorted(covered))
        except ValueError:
            excess = math.inf  # some of it is nowhere, or twice
        yield Row(kind, name, max(part[0] for part in parts), scales[name], excess)


def _packs(names: list[tuple[str, list[int]]]) -> Iterator[list[tuple[str, list[int]]]]:
    """The names in portions of about PACK elements: many small tensors travel together."""
    pack: list[tuple[str, list[int]]] = []
    elements = 0
    for each in names:
        pack.append(each)
        elements += math.prod(each[1])
        if elements >= PACK:
            yield pack
            pack, elements = [], 0
    if pack:
        yield pack


def _sent(comm: Communicator, pack: list[tuple[str, list[int]]], of: Callable[[str], Array]) -> Tensors:
    """The arrays `of` rank 0 by name, on all ranks; float64."""
    flat = np.empty(sum(math.prod(shape) for _, shape in pack))
    if comm.rank == 0:
        np.concatenate([of(name).reshape(-1) for name, _ in pack], out=flat)
    flat, end, arrays = comm.broadcast(flat), 0, {}
    for name, shape in pack:
        start, end = end, end + math.prod(shape)
        arrays[name] = flat[start:end].reshape(shape)
    return arrays


def _largest(blocks: list[Block], value: Array, limits: Array) -> tuple[float, float, list[Box]]:
    """(largest difference, largest difference / limit, boxes) of the blocks of a tensor that a rank holds."""
    difference = excess = 0.0
    boxes = []
    for block in blocks:
        box = tuple(slice(first, first + n) for first, n in zip(block.start, block.array.shape, strict=True))
        apart = np.abs(block.array.astype(np.float64) - value[box])
        apart[np.isnan(apart)] = np.inf
        difference = max(difference, float(apart.max(initial=0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = max(excess, float(np.where(apart > 0, apart / limits[box], 0.0).max(initial=0)))
        boxes.append((tuple(each.start for each in box), tuple(each.stop for each in box)))
    return difference, excess, boxes


def _expected(kind: str, reference: Reference) -> Tensors:
    if kind == "parameter":
        return reference.values
    found = reference.first if kind == "gradient 1" else reference.last
    return {name: found[name] for name in reference.values}


def _adapted(name: str, reference: Reference | None, relative: float) -> Array:
    """What is allowed to the elements of a parameter beside rounding: Adam and its kin divide a gradient by its own
    size, so an element whose gradient is rounding error itself goes anywhere, as far as others go."""
    assert reference is not None
    smallest = reference.smallest[name]
    noise = relative * max(
        float(np.abs(reference.first[name]).max(initial=0)),
        LEAST_SCALE * max(float(np.abs(g).max(initial=0)) for g in reference.first.values()),
    )
    return 2 * reference.moved[name] * noise / np.maximum(smallest, max(noise, np.finfo(np.float64).tiny))


def _size(x: float) -> float:
    return math.inf if math.isnan(x) else abs(x)


def _excess(difference: float, allowed: float) -> float:
    return 0.0 if difference == 0 else difference / allowed if allowed else math.inf
