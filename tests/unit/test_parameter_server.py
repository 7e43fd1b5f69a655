"""Parameter servers on in-process ranks: synchronous = one process, and what the other modes promise.

Checks of the course: 21 (sync = one process), 22 (asynchronous: a slow worker does not slow the others, gradients are
stale), 23 (a quorum of 0.9 of 10 workers goes on with 9). Counted in updates, never in seconds.
"""

import functools
import json
from typing import Any

import numpy as np
import pytest

from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from tests import served, training
from tests.served import BASE, Gate


@functools.cache
def reference(sections: str) -> tuple[Any, list[float | None], dict[str, Any]]:
    """Losses and norms, validation losses, parameters of one process."""
    trainer = training.trainer(single(), **json.loads(sections))
    records = list(trainer.run())
    return training.losses(records), [record.validation_loss for record in records], training.parameters(trainer)


def run(workers: int, servers: int, mode: str = "sync", options: Any = (), **sections: Any) -> list[served.Served]:
    """The results of all ranks, workers first."""
    sections = {**BASE, **sections, "parameter_server": {"servers": servers, "mode": mode, **dict(options)}}
    return run_threads(workers + servers, lambda comm: served.serve(comm, **sections))


def compare(results: list[served.Served], workers: int, tolerance: float = 1e-10, **sections: Any) -> None:
    """All of it equals one process."""
    losses, validation, parameters = reference(json.dumps({**BASE, **sections}))
    records = results[workers].records
    np.testing.assert_allclose(training.losses(records), losses, rtol=tolerance)
    assert [record.validation_loss for record in records] == [
        None if loss is None else pytest.approx(loss, rel=tolerance) for loss in validation
    ]
    for name, values in served.whole(results, parameters).items():
        np.testing.assert_allclose(values, parameters[name], rtol=tolerance, atol=tolerance, err_msg=name)


# --- synchronous = one process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["mpi", "sockets"])  # "mpi": what brought the communicator, here threads
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (1, 3), (3, 1), (3, 2), (5, 3)])
def test_synchronous_equals_one_process(workers, servers, transport):
    """Also where the shares of a batch are uneven: 12 samples on 5 workers."""
    results = run(workers, servers, options={"transport": transport})
    compare(results, workers)
    assert results[workers].lead.ledger.staleness == {0: 3 * workers}
    assert results[workers].notes == []


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "lamb", "adafactor"])
def test_every_optimizer_runs_on_the_servers(kind):
    optimizer = {"kind": kind, "learning_rate": 3e-3, "weight_decay": 0.1, "clip_norm": 0.5}
    compare(run(2, 2, optimizer=optimizer), 2, optimizer=optimizer)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {**BASE["model"], "dropout": 0.2}},
        {"model": {**BASE["model"], "kind": "bert"}},
        {
            "model": {"kind": "mlp", "hidden": [24]},
            "data": {"kind": "images", "path": "digits"},
            "train": {"steps": 3, "global_batch": 20, "micro_batch": 4},
        },
    ],
    ids=["dropout", "bert", "mlp"],
)
def test_every_model(sections):
    compare(run(2, 2, **sections), 2, **sections)


def test_half_precision_has_its_master_copies_on_the_servers():
    sections = {"train": {**BASE["train"], "dtype": "bfloat16"}}
    results = run(2, 2, **sections)
    losses, _, parameters = reference(json.dumps({**BASE, **sections}))
    np.testing.assert_allclose(training.losses(results[2].records), losses, rtol=2e-2)
    assert set(served.whole(results, parameters)) == set(parameters)


@pytest.mark.parametrize("transport", ["mpi", "sockets"])
@pytest.mark.parametrize("mode", ["async", "ssp", "local_sgd"])
def test_one_worker_is_one_process_in_every_mode(mode, transport):
    compare(run(1, 2, mode, {"transport": transport}), 1)


def test_a_run_is_the_same_again_bit_for_bit():
    first, second = (run(3, 2) for _ in range(2))
    assert [record.loss for record in first[3].records] == [record.loss for record in second[3].records]
    for one, other in zip(first, second, strict=True):
        for name, (start, values) in one.parameters.items():
            assert start == other.parameters[name][0]
            np.testing.assert_array_equal(values, other.parameters[name][1])


# --- asynchronous, bounded staleness, quorum --------------------------------------------------------------------------


def test_asynchronous_goes_on_while_one_worker_stands_still():
    """Worker 0 computes its first gradient until the others have made all other updates: 8 of 9."""
    gate, others = Gate(), [0, 0]

    def prepare(worker):
        if worker.comm.rank == 0:
            return gate.hold(worker)
        push, index = worker.push, worker.comm.rank - 1

        def counted(*arguments: Any) -> None:
            assert gate.reached.wait(50)  # worker 0 has pulled before the first update
            push(*arguments)
            others[index] += 1
            if sum(others) == 8:
                gate.open.set()

        worker.push = counted

    sections = {**BASE, "train": {**BASE["train"], "validate": {"every": 0}}}
    sections["parameter_server"] = {"servers": 2, "mode": "async"}
    results = run_threads(5, lambda comm: served.serve(comm, prepare, **sections))
    book = results[3].lead.ledger
    assert [worker.applied for worker in book.workers] == [1, *others] and sum(others) == 8
    assert book.staleness[8] == 1 and book.version == 9
    assert [record.step for record in results[3].records] == [1, 2, 3]
    assert [results[rank].server.trainer.optimizer.steps for rank in (3, 4)] == [9, 9]


def test_a_quorum_of_nine_of_ten_goes_on_with_nine():
    """Worker 4 stands still until all updates are made; its one gradient is dropped and reported."""
    gate = Gate()

    def prepare(worker):
        if worker.comm.rank == 4:
            gate.hold(worker)

    class Opener(list):
        def append(self, record):
            super().append(record)
            if record.step == 3:
                gate.open.set()

    sections = {**BASE, "train": {**BASE["train"], "validate": {"every": 0}}}
    sections["parameter_server"] = {"servers": 2, "mode": "sync", "quorum": 0.9}

    def start(comm):
        return served.serve(comm, prepare, records=Opener(), **sections)

    results = run_threads(12, start)
    book = results[10].lead.ledger
    assert book.quorum == 9 and book.version == 3
    assert [worker.applied for worker in book.workers] == [3, 3, 3, 3, 0, 3, 3, 3, 3, 3]
    assert book.workers[4].dropped <= 1  # none, when the run was over before it came
    tokens = 12 * 8  # twelve samples on ten workers: the first two have two of them
    assert [record.tokens for record in results[10].records] == [tokens - 8] * 3


def test_bounded_staleness_stops_the_fast_and_asynchronous_does_not():
    """Worker 0 stands still. The others may be 2 gradients ahead: they make 3 each, then wait for it."""
    gate, waits = Gate(), []

    def prepare(worker):
        if worker.comm.rank == 0:
            gate.hold(worker)

    sections = {**BASE, "train": {**BASE["train"], "steps": 6, "validate": {"every": 0}}}
    sections["parameter_server"] = {"servers": 1, "mode": "ssp", "staleness": 2}

    def watch(lead):
        tick = lead.tick

        def watched() -> None:
            clocks = [worker.clock for worker in lead.ledger.workers]
            if clocks[1:] == [3, 3] and all(worker.holds is None for worker in lead.ledger.workers[1:]):
                waits.append(clocks)
                gate.open.set()
            assert max(clocks) - min(clocks) <= 3
            tick()

        lead.tick = watched

    results = run_threads(4, lambda comm: served.serve(comm, prepare, watch=watch, **sections))
    assert waits[0] == [0, 3, 3]
    assert results[3].lead.ledger.version == 18


# --- local SGD --------------------------------------------------------------------------------------------------------


def test_local_sgd_with_averages_every_step_is_synchronous():
    """Averages of what momentum makes of gradients are what it makes of their average."""
    optimizer = {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    results = run(3, 2, "local_sgd", {"period": 1}, optimizer=optimizer)
    losses, validation, parameters = reference(json.dumps({**BASE, "optimizer": optimizer}))
    np.testing.assert_allclose(training.losses(results[3].records)[:, 0], losses[:, 0], rtol=1e-10)
    assert results[3].records[-1].validation_loss == pytest.approx(validation[-1], rel=1e-10)
    for name, values in served.whole(results, parameters).items():
        np.testing.assert_allclose(values, parameters[name], atol=1e-10)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_local_sgd_is_the_mean_of_separate_runs(kind):
    """The oracle: trainers of one process on the shares of the workers, averaged by hand every 2 steps."""
    sections = {**BASE, "train": {**BASE["train"], "steps": 4, "validate": {"every": 0}}}
    sections["optimizer"] = {"kind": kind, "learning_rate": 3e-3, "clip_norm": 1.0}
    results = run(2, 2, "local_sgd", {"period": 2}, **sections)
    trainers = [training.trainer(single(), **sections) for _ in range(2)]
    for part, trainer in enumerate(trainers):
        trainer._data_rank = lambda part=part: (part, 2)
    for _ in range(2):
        for trainer in trainers:
            trainer.train_step()
            trainer.train_step()
        states = [
            {**{n: p.data for n, p in each.model.named_parameters().items()}, **each.optimizer.per_parameter_state()}
            for each in trainers
        ]
        for name in states[0]:
            mean = (states[0][name] + states[1][name]) / 2
            for state in states:
                state[name][...] = mean
    expected = training.parameters(trainers[0])
    for name, values in served.whole(results, expected).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-10, atol=1e-12, err_msg=name)
    assert len(results[2].records) == 4 and results[2].lead.version == 2


# --- traffic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_the_link_of_a_server_grows_with_the_workers_and_a_ring_does_not(workers):
    """Course, E5: 2 W Ψ per step through one server; through a rank of a ring 2 (W - 1) / W Ψ each way, below 2 Ψ."""
    sections = {**BASE, "train": {**BASE["train"], "validate": {"every": 0}}}
    result = run_threads(
        workers + 1, lambda comm: served.serve(comm, **sections, parameter_server={"servers": 1, "mode": "sync"})
    )[workers]
    steps, size = 3, training.trainer(single(), **sections).num_parameters
    pulled = steps * workers * size * 8
    rest = steps * workers * 1000  # headers and tallies, far below the arrays
    assert pulled <= result.sent <= pulled + rest and pulled <= result.received <= pulled + rest

    def ring(comm: Any) -> int:
        comm.counters.reset()
        comm.all_reduce(np.zeros(size), algorithm="ring")
        return int(comm.counters.volume().sent)

    sent = run_threads(workers, ring)
    assert max(sent) <= (2 * (workers - 1) / workers * size + 2 * workers) * 8 < 2 * size * 8


# --- rows of embeddings -----------------------------------------------------------------------------------------------


def test_rows_of_embeddings_equal_the_dense_pull_and_cost_the_distinct_keys():
    def sections(vocabulary, **options):
        model = {**BASE["model"], "tied": False, "vocabulary": vocabulary}
        train = {**BASE["train"], "validate": {"every": 0}}
        return {**BASE, "model": model, "train": train, "parameter_server": {"servers": 2, **options}}

    def distinct(worker):
        seen = worker.distinct = []
        push = worker.push

        def counted(*arguments: Any) -> None:
            seen.append(worker.rows["embedding.weight"].ids.size)
            push(*arguments)

        worker.push = counted

    def go(values, prepare=lambda worker: None):
        return run_threads(4, lambda comm: served.serve(comm, prepare, **values))

    dense, sparse = go(sections(512)), go(sections(512, sparse=["embedding"]), distinct)
    for one, other in zip(dense[2].records, sparse[2].records, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-12)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-12)
    for rank in (2, 3):
        for name, (_, values) in dense[rank].parameters.items():
            np.testing.assert_allclose(sparse[rank].parameters[name][1], values, rtol=1e-11, atol=1e-13)

    row, large = 16 * 8, go(sections(1024, sparse=["embedding"]), distinct)
    for rank in (0, 1):
        keys = sum(sparse[rank].worker.distinct)
        assert 0 < keys < 3 * 200 and sum(large[rank].worker.distinct) == keys
        saved = dense[rank].received - sparse[rank].received
        assert saved == 3 * 512 * row - keys * row  # the table in each of three steps, against the rows of its ids
        # The head has 512 rows more, of 16 numbers; the table adds nothing, though it is twice as long.
        assert large[rank].received - sparse[rank].received == 3 * 512 * row


@pytest.mark.parametrize(
    ("name", "tied", "message"),
    [
        ("embedding", True, "weight nothing else uses; allowed: positions"),
        ("embeding", False, "allowed: embedding, positions"),
    ],
)
def test_only_embeddings_of_their_own_are_sparse(name, tied, message):
    with pytest.raises(UserError, match=message):
        run(1, 1, options={"sparse": [name]}, model={**BASE["model"], "tied": tied})


def test_a_table_that_is_no_embedding_is_told():
    with pytest.raises(UserError, match="positions; no row of it was looked up"):
        run(1, 1, options={"sparse": ["positions"]})


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_servers_is_one_of_any_layout(tmp_path):
    """Three servers write step 2; two servers, and one process, go on from it as if nothing had happened."""
    sections = {**BASE, "checkpoint": {"every": 2}}
    first = {**sections, "train": {**BASE["train"], "steps": 2}}
    # The learning rate must be that of the whole run.
    first["schedule"] = sections["schedule"] = {"kind": "constant"}
    run_threads(5, lambda comm: served.serve(comm, folder=tmp_path, **first, parameter_server={"servers": 3}))
    step = tmp_path / "step_00000002"
    losses, _, parameters = reference(json.dumps(sections))
    results = run_threads(4, lambda comm: served.serve(comm, resume=step, **sections, parameter_server={"servers": 2}))
    assert results[2].records[0].step == 3
    assert results[2].records[0].loss == pytest.approx(losses[2, 0], rel=1e-10)
    for name, values in served.whole(results, parameters).items():
        np.testing.assert_allclose(values, parameters[name], rtol=1e-10, atol=1e-12)
    alone = training.trainer(single(), **sections)
    alone.load(step)
    assert alone.train_step().loss == pytest.approx(losses[2, 0], rel=1e-10)


@pytest.mark.parametrize("mode", ["async", "local_sgd"])
def test_other_modes_go_on_from_their_checkpoints(mode, tmp_path):
    """With one worker there is one order of events: interrupted and not are equal."""
    sections = {**BASE, "checkpoint": {"every": 2}, "schedule": {"kind": "constant"}}
    first = {**sections, "train": {**BASE["train"], "steps": 2}}
    options = {"servers": 2, "mode": mode}
    run_threads(3, lambda comm: served.serve(comm, folder=tmp_path, **first, parameter_server=options))
    step = tmp_path / "step_00000002"
    results = run_threads(3, lambda comm: served.serve(comm, resume=step, **sections, parameter_server=options))
    losses, _, parameters = reference(json.dumps(sections))
    assert results[1].records[0].loss == pytest.approx(losses[2, 0], rel=1e-10)
    for name, values in served.whole(results, parameters).items():
        np.testing.assert_allclose(values, parameters[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "async"}, "parameter_server.servers: 0; the other keys"),
        ({"servers": 2, "mode": "async", "quorum": 0.5}, "quorum: 0.5; mode async waits for nobody"),
        ({"servers": 2, "quorum": 0.0}, "quorum: 0.0; must be above 0"),
        ({"servers": 2, "slow": [0.5]}, "slow: .*every factor must be 1 or more"),
        ({"servers": 2, "mode": "local_sgd", "sparse": ["embedding"]}, "sparse: .*whole copies"),
        ({"servers": 4}, "leaves no worker of 4 ranks: must be 3 or less, or start 5 ranks or more"),
        ({"servers": 3, "slow": [1.0, 2.0]}, "there are 1 workers only"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises((ValueError, UserError), match=message):
        run_threads(4, lambda comm: served.serve(comm, **BASE, parameter_server=options))


def test_one_rank_cannot_serve_and_compute():
    with pytest.raises(UserError, match="leaves no worker of 1 rank: start 2 ranks or more"):
        run_threads(1, lambda comm: served.serve(comm, **BASE, parameter_server={"servers": 1}))
