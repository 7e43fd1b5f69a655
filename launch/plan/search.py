"""The cheapest legal layouts: best first, with a bound that lets most of them be skipped.

    degrees dp x ep x cp x tp x pp ── microbatch, sequence, recomputation, way of cutting ──► a bound: work alone
                                               └── schedules x ways of data parallelism ──► the cost

Groups are opened in the order of their bounds, until the next bound is above the cost of the k-th best mesh that was
found: what is left cannot be among the k best. `everything` opens them all, and is what a test compares with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec

from dtrain import config as schema
from dtrain.config import Config
from dtrain.config.rules import divisors
from dtrain.launch.plan.costs import Cost, bound, cost
from dtrain.launch.plan.layout import Job, Layout
from dtrain.launch.plan.microbatch import Work, work
from dtrain.launch.plan.profile import Profile
from dtrain.launch.plan.stages import stages

ZERO = ("ddp", "zero1", "zero2", "zero3")  # the simplest first: among equals it is taken
ALIKE = 0.05  # times in one step of so much count as equal: the model does not know better, and simple is better
WIDEST_V = 16  # ranks: zb_v is made by a rule that takes long for more, and waits more than others do
GROUPS = (("1f1b", "gpipe", "zb_h1"), ("interleaved",), ("zb_v",))  # schedules that cut the model alike
Mesh = tuple[int, ...]
Group = tuple[float, Layout, Work, tuple[str, ...]]


def cheapest(job: Job, config: Config, count: int = 5) -> tuple[list[Cost], Cost | None, int]:
    """(the cheapest of each mesh that fit the memory, of the `count` best meshes; what takes least memory; how many
    were costed).

    Among layouts of equal time the simplest, by `rank`.
    """
    best: dict[Mesh, Cost] = {}
    smallest: Cost | None = None
    costed = 0
    for group in sorted(groups(job, config), key=lambda group: group[0]):
        ordered = sorted(best.values(), key=rank)
        if len(ordered) >= count and _class(group[0]) > _class(ordered[count - 1].seconds):
            break
        for each in _opened(job, *group[1:]):
            costed += 1
            mesh = degrees(each.layout)
            if smallest is None or each.memory < smallest.memory:
                smallest = each
            if each.memory <= job.machine.memory and (mesh not in best or rank(each) < rank(best[mesh])):
                best[mesh] = each
    return sorted(best.values(), key=rank)[:count], smallest, costed


def everything(job: Job, config: Config) -> list[Cost]:
    """All legal layouts, cheapest first, whether they fit or not."""
    return sorted((c for group in groups(job, config) for c in _opened(job, *group[1:])), key=rank)


def degrees(layout: Layout) -> Mesh:
    """Of all axes."""
    return layout.dp, layout.ep, layout.cp, layout.tp, layout.pp


def rank(cost: Cost) -> tuple[int, int, int, float, float]:
    """What is sorted by: time in steps of ALIKE, then simplicity, then time and memory."""
    layout = cost.layout
    extras = sum(size > 1 for size in (layout.tp, layout.pp, layout.cp, layout.ep))
    extras += layout.sequence + layout.recompute + (layout.tensor == "2d")
    return _class(cost.seconds), extras, ZERO.index(layout.data_parallel), cost.seconds, cost.memory


def _class(seconds: float) -> int:
    return math.floor(math.log(seconds) / math.log1p(ALIKE))


def groups(job: Job, config: Config) -> Iterator[Group]:
    """(bound, layout without schedule and data parallelism, its work, its schedules) of all that is legal."""
    for plain, schedules in _shapes(job):
        cut = stages(job.profile, plain)
        for micro_batch in divisors(job.global_batch // plain.data):
            if micro_batch % plain.grid[0] or not legal(config, replace(plain, micro_batch=micro_batch), job.ranks):
                continue
            for recompute in (False, True):
                layout = replace(plain, micro_batch=micro_batch, recompute=recompute)
                known = work(job, layout, cut)
                yield bound(job, layout, known), layout, known, schedules


def _shapes(job: Job) -> Iterator[tuple[Layout, tuple[str, ...]]]:
    """Degrees with what belongs to them, and the schedules that cut the model alike."""
    profile, ranks = job.profile, job.ranks
    deepest = max(1, len(profile.blocks))  # the two ends are a stage also where no block is between them
    for tp, pp, cp, ep in itertools.product(divisors(ranks), repeat=4):
        dp, left = divmod(ranks, tp * pp * cp * ep)
        if left or pp > deepest or job.global_batch % (dp * ep):
            continue
        for schedules, tensor in itertools.product(GROUPS if pp > 1 else ((GROUPS[0][0],),), ("1d", "2d")):
            plain = Layout(dp, tp, pp, schedule=schedules[0], cp=cp, ep=ep, tensor=tensor)
            if pp * plain.chunks > deepest or (plain.schedule == "zb_v" and pp > WIDEST_V):
                continue
            if not _has_parts(profile, plain):
                continue
            for sequence in (False, True) if tp > 1 and profile.tokens and tensor == "1d" else (False,):
                for context in _contexts(profile, tp, cp):
                    yield replace(plain, sequence=sequence, context=context), schedules


def _has_parts(profile: Profile, layout: Layout) -> bool:
    """Whether every rank has a head, tokens and an expert; a grid is one where it has more than one row."""
    rows, columns = layout.grid
    heads = columns <= profile.kv_heads or not profile.tokens
    tokens = layout.cp == 1 or (profile.tokens and 2 * layout.cp * columns <= profile.length)
    experts = layout.ep == 1 or layout.ep <= profile.experts
    return heads and tokens and experts and (layout.tensor == "1d" or rows > 1)


def _contexts(profile: Profile, tp: int, cp: int) -> tuple[str, ...]:
    """Ulysses needs heads for all ranks, and is planned where they can be shared out evenly."""
    even = profile.query_heads % (tp * cp) == 0 and profile.kv_heads % tp == 0
    return ("ring", "ulysses") if cp > 1 and even else ("ring",)


def legal(config: Config, layout: Layout, ranks: int) -> bool:
    """Whether `dtrain.config.check` takes it."""
    try:
        schema.check(applied(config, layout), ranks)
    except ValueError:
        return False
    return True


def applied(config: Config, layout: Layout) -> Config:
    """The configuration with this layout written in."""
    parallel = msgspec.structs.replace(
        config.parallel,
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        ep=layout.ep,
        context=layout.context,
        tensor=layout.tensor,
        grid=None,
        plan=None,
        data_parallel=layout.data_parallel,
        sequence=layout.sequence,
        auto=False,
    )
    pipeline = msgspec.structs.replace(
        config.pipeline, schedule=layout.schedule, microbatches=None, chunks=None, cut=None
    )
    train = msgspec.structs.replace(config.train, micro_batch=layout.micro_batch, recompute=layout.recompute)
    return msgspec.structs.replace(config, parallel=parallel, pipeline=pipeline, train=train)


def _opened(job: Job, layout: Layout, known: Work, schedules: Sequence[str]) -> Iterator[Cost]:
    for schedule in schedules:
        for kind in ZERO if layout.sharers > 1 else ZERO[:1]:
            found = cost(job, replace(layout, schedule=schedule, data_parallel=kind), known)
            if found is not None:
                yield found
