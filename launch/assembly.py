"""From a configuration to a trainer: the only place where the names in a configuration choose among the families."""

from __future__ import annotations

from typing import Any

import msgspec

from dtrain import models
from dtrain.collectives import Communicator
from dtrain.config import Config
from dtrain.data import Data, data_of
from dtrain.errors import UserError
from dtrain.launch.configuration import for_ranks
from dtrain.mesh import Mesh
from dtrain.strategies import AXES, DATA_PARALLEL, make_embedding, make_lora
from dtrain.strategy import Strategy
from dtrain.trainer import Trainer


def assemble(config: Config, comm: Communicator) -> Trainer:
    """Build mesh, data, model, strategies and optimizer of `config` on the ranks of `comm`. Collective.

    Raises UserError when the mesh or the batch does not fit the ranks, or the data does not fit the model.
    """
    config, _ = planned(config, comm)
    config = for_ranks(config, comm.size)
    mesh = make_mesh(config, comm)
    data, model = parts(config, comm)
    return Trainer(config, mesh, data, model, strategies(config))


def planned(config: Config, comm: Communicator) -> tuple[Config, list[str]]:
    """The configuration with what `parallel: auto` leaves open, chosen by rank 0, and why. Collective."""
    if not config.parallel.auto:
        return config, []
    answer: list[Any] = [None, []]
    if comm.rank == 0:
        from dtrain.launch import plan  # many files that few runs need

        try:
            found, told = plan.chosen(config, comm.size, comm.hosts.count(comm.hosts[0]))
            answer = [msgspec.to_builtins(found), told]
        except UserError as error:
            answer = [None, [str(error)]]
    values, told = comm.broadcast_object(answer)
    if values is None:
        raise UserError(told[0])
    return msgspec.convert(values, Config), told


def parts(config: Config, comm: Communicator) -> tuple[Data, models.Model]:
    """Data and outline of the model; UserError where ranks read different data. Collective."""
    data = data_of(config)
    _refuse_different_data(data, comm)
    model = models.outline(config.model, data, dtype=config.train.dtype)
    model.recompute = config.train.recompute
    return data, model


def make_mesh(config: Config, comm: Communicator) -> Mesh:
    """The mesh of the section `parallel`, whose dp is filled in. Collective."""
    p = config.parallel
    sizes = {"pp": p.pp, "dp": p.dp, "cp": p.cp, "ep": p.ep, "tp": p.tp}
    return Mesh(comm, **sizes, order=p.order, reproducible=p.reproducible, grid=p.tensor_grid())


def strategies(config: Config) -> list[Strategy]:
    """The strategies of a mesh, in the order in which they are applied; one process has none: it is the reference."""
    parallel = config.parallel
    chosen: list[Strategy] = []
    if parallel.dp > 1 and parallel.embedding != "replicate" and config.model.kind == "dlrm":
        chosen.append(make_embedding(config))
    for axis, make in AXES.items():
        if axis == "pp" and config.lora is not None:
            chosen.append(make_lora(config))
        if getattr(parallel, axis) > 1:
            chosen.append(make(config))
    overlapped = 1 if parallel.data_parallel == "naive" else parallel.cp  # the others sum over both at once
    if parallel.dp * parallel.ep * overlapped > 1:  # dp and ep have samples of their own, to be summed over
        chosen.append(DATA_PARALLEL[parallel.data_parallel](parallel))
    return chosen


def _refuse_different_data(data: Data, comm: Communicator) -> None:
    """Hosts that read different files would train a model on neither."""
    prints = comm.all_gather_object(data.fingerprint)
    for rank, fingerprint in enumerate(prints):
        if fingerprint != prints[0]:
            raise UserError(
                f"data.path: rank {rank} on {comm.hosts[rank]} reads other content than rank 0 on {comm.hosts[0]}; "
                "all hosts must see the same files"
            )
