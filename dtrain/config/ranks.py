"""What only the number of ranks decides: whether mesh and batch fit, and the size of the data axis."""

import itertools
import math
from collections.abc import Mapping

from msgspec.structs import replace

from dtrain.config.rules import divisors, listed, nearest_multiples
from dtrain.config.whole import Config


def check(config: Config, num_ranks: int) -> Config:
    """Return the configuration with `parallel.dp` filled in; ValueError when mesh or batch do not fit `num_ranks`."""
    if config.parameter_server.servers:
        return _served(config, num_ranks)
    parallel = config.parallel
    dp = filled({axis: getattr(parallel, axis) for axis in ("pp", "dp", "cp", "ep", "tp")}, num_ranks)["dp"]
    if config.optimizer.kind == "adafactor" and dp * parallel.cp > 1 and parallel.data_parallel.startswith("zero"):
        raise ValueError(
            "optimizer.kind: adafactor; its rows and columns are of whole parameters, which parallel.data_parallel: "
            f"{parallel.data_parallel} cuts anywhere. Allowed: sgd, adam, adamw, lamb; or data_parallel: ddp, naive"
        )
    train = config.train
    if parallel.reproducible and dp & (dp - 1):
        raise ValueError(f"parallel.dp: {dp}; with parallel.reproducible: true, allowed: a power of two")
    data_ranks = dp * parallel.ep  # that have samples of their own
    names = "parallel.dp x parallel.ep" if parallel.ep > 1 else "parallel.dp"
    numbers = f"{dp} x {parallel.ep}" if parallel.ep > 1 else f"{dp}"
    if parallel.pp > 1 and config.pipeline.microbatches is not None:
        portions = data_ranks * config.pipeline.microbatches
        if train.global_batch % portions:
            nearest = nearest_multiples(train.global_batch, portions)
            raise ValueError(
                f"train.global_batch: {train.global_batch}; must be a multiple of {names} x pipeline.microbatches "
                f"= {numbers} x {config.pipeline.microbatches} = {portions}, nearest: {nearest}"
            )
        train = replace(train, micro_batch=train.global_batch // portions)
    portion = data_ranks * train.micro_batch
    if train.global_batch % portion:
        fits = divisors(train.global_batch // data_ranks) if train.global_batch % data_ranks == 0 else []
        raise ValueError(
            f"train.global_batch: {train.global_batch}; must be a multiple of {names} x train.micro_batch = "
            f"{numbers} x {train.micro_batch} = {portion}, nearest: {nearest_multiples(train.global_batch, portion)}"
            + (f"; or train.micro_batch: {listed(fits)}" if fits else "")
        )
    return replace(config, parallel=replace(parallel, dp=dp), train=train)


def _served(config: Config, num_ranks: int) -> Config:
    """The configuration with `parallel.dp` the number of workers."""
    servers, parallel = config.parameter_server.servers, config.parallel
    if config.model.kind == "moe_gpt":
        raise ValueError("model.kind: moe_gpt; parameter servers do not balance experts: use parallel.ep")
    workers = num_ranks - servers
    if workers < 1:
        raise ValueError(
            f"parameter_server.servers: {servers}; leaves no worker of {num_ranks} rank{'s' * (num_ranks > 1)}: "
            + (f"must be {num_ranks - 1} or less, or " if num_ranks > 1 else "")
            + f"start {servers + 1} ranks or more"
        )
    for axis in ("tp", "pp", "cp", "ep"):
        if getattr(parallel, axis) != 1:
            raise ValueError(f"parallel.{axis}: {getattr(parallel, axis)}; with parameter_server, allowed: 1")
    if parallel.dp not in (-1, workers):
        raise ValueError(
            f"parallel.dp: {parallel.dp}; {num_ranks} ranks with {servers} servers have {workers} workers: allowed: "
            f"{workers}, or -1"
        )
    if config.train.global_batch < workers:
        raise ValueError(
            f"train.global_batch: {config.train.global_batch}; must be {workers} or more, a sample for each worker"
        )
    if len(config.parameter_server.slow) > workers:
        raise ValueError(
            f"parameter_server.slow: {list(config.parameter_server.slow)}; there are {workers} workers only"
        )
    return replace(config, parallel=replace(parallel, dp=workers))


def filled(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The sizes with dp=-1 replaced by what the others leave; ValueError where they do not make up `num_ranks`."""
    for axis, size in sizes.items():
        if size < 1 and not (axis == "dp" and size == -1):
            also = ", or -1 for what the other axes leave" if axis == "dp" else ""
            raise ValueError(f"parallel.{axis}: {size}; must be 1 or more{also} ({num_ranks} ranks)")
    free = sizes["dp"] == -1
    product = math.prod(size for size in sizes.values() if size > 0)
    if free and num_ranks % product == 0:
        return {**sizes, "dp": num_ranks // product}
    if product == num_ranks and not free:
        return dict(sizes)
    # Which single axis could be changed to make it fit? dp first: it is the one that is usually left over.
    for axis in ("dp", "tp", "cp", "ep", "pp"):
        rest, left = divmod(num_ranks, product // max(1, sizes[axis]))
        if not left and (sizes[axis] > 1 or (axis == "dp" and not free)):
            legal = divisors(rest) if free else [rest]
            fitting = " or ".join(map(str, sorted(sorted(legal, key=lambda size: abs(size - sizes[axis]))[:2])))
            break
    else:
        axis = next(axis for axis in ("tp", "cp", "ep", "pp", "dp") if sizes[axis] > 1)
        fitting = " or ".join(
            _nearest_meshes({name: size for name, size in sizes.items() if size > 1}, num_ranks, free)
        )
    more = -(-num_ranks // product) * product if sizes["dp"] == -1 else product
    others = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 and name != axis)
    raise ValueError(
        f"parallel.{axis}: {sizes[axis]}; does not fit {num_ranks} ranks{' with ' + others if others else ''}: "
        f"the sizes of all axes multiply to the number of ranks. Nearest that can: {fitting}"
        f"{', or -1' if axis == 'dp' else ''}; or start {more} ranks"
    )


def _nearest_meshes(sizes: Mapping[str, int], num_ranks: int, free: bool) -> list[str]:
    """The two meshes of these axes nearest to their sizes that fit; free: dp takes what they leave."""
    found = [
        mesh
        for mesh in itertools.product(divisors(num_ranks), repeat=len(sizes))
        if (num_ranks % math.prod(mesh) == 0 if free else math.prod(mesh) == num_ranks)
    ]
    found.sort(key=lambda mesh: sum(abs(math.log(new / old)) for new, old in zip(mesh, sizes.values(), strict=True)))
    return [" x ".join(f"{axis}={size}" for axis, size in zip(sizes, mesh, strict=True)) for mesh in found[:2]]
