"""Runs the program of one rank: forwards, backwards, and the messages between stages that follow from them.

    F(s, m)   x ◄─ recv from stage s-1      y = stage(x)           y ─► send to stage s+1
    B(s, m)   g ◄─ recv from stage s+1      backward of y with g   gradient of x ─► send to stage s-1

Sends never wait, and receives are posted `AHEAD` actions before they are needed, so a message travels while its rank
computes. A message has its own tag (stage, direction, microbatch); no order of the actions can mix them up. Two stages
on one rank hand their tensors over without a message. The shape of an activation is asked for once per shape of input.

Invariant: what the engine computes depends on the program alone, never on when messages come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from dtrain.arrays import Array, named_dtype
from dtrain.autograd import backward, split_backward
from dtrain.collectives import Communicator, Work
from dtrain.strategies.pipeline.schedules import Action, Program
from dtrain.strategies.pipeline.stages import Stage
from dtrain.strategies.pipeline.timeline import Span
from dtrain.strategy import Microbatch
from dtrain.tensor import Tensor

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

AHEAD = 2
MOST_DIMS = 8
FORWARD, BACKWARD, SHAPE = range(3)
Key = tuple[int, int, int]  # stage that receives, direction, microbatch
Shape = tuple[int, ...]


class Engine:
    """The stages of this rank and their messages; one object for the whole training."""

    def __init__(self, comm: Communicator, stages: dict[int, Stage], rank_of: Sequence[int]) -> None:
        self.comm, self.stages, self.rank_of = comm, stages, rank_of
        self.shapes: dict[tuple[int, Shape], Shape] = {}
        self.told: set[tuple[int, Shape]] = set()
        self.spans: list[Span] = []
        """Of the last step, on this rank; in seconds of `time.perf_counter`."""
        owners = [p for stage in stages.values() for p in set(stage.parameters())]
        self.apart = len(owners) == len(set(owners))
        """Whether each parameter is used by one stage of this rank: its gradient is then complete with that stage's."""

    def run(
        self, trainer: Trainer, program: Program, microbatches: Sequence[Microbatch], training: bool = True
    ) -> tuple[float, float]:
        """The actions of `program`; returns (sum of the losses, targets), (0, 0) without the last stage."""
        self.trainer, self.microbatches, self.training = trainer, microbatches, training
        self.dtype = named_dtype(trainer.config.train.dtype)
        self.arriving: dict[Key, Work | Array] = {}
        self.leaving: list[Work] = []
        self.kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.later: dict[tuple[int, int], Callable[[], None]] = {}
        self.loss = self.count = 0.0
        self.spans = []
        does = {"F": self._forward, "B": self._backward, "I": self._inputs, "W": self._weights}
        final = {(action.stage, action.kind): place for place, action in enumerate(program)}
        for place, action in enumerate(program):
            for coming in program[place : place + 1 + AHEAD]:
                self._expect(coming)
            data = self._received(action)
            start = time.perf_counter()
            complete = self.apart and final[action.stage, action.kind] == place
            with nullcontext() if complete or action.kind == "F" else trainer.no_sync():
                does[action.kind](action, data)
            self.spans.append(Span(self.comm.rank, action, start, time.perf_counter()))
        for work in self.leaving:
            work.wait()
        return self.loss, self.count

    def evaluate(self, trainer: Trainer, microbatches: Iterable[Microbatch]) -> tuple[float, float]:
        """The forwards alone, one microbatch after the other through the stages of this rank, without dropout."""
        portions = list(microbatches)
        spans = self.spans
        program = [Action(stage, "F", m) for m in range(len(portions)) for stage in sorted(self.stages)]
        result = self.run(trainer, program, portions, training=False)
        self.spans = spans
        return result

    # What an action does

    def _forward(self, action: Action, data: Array | None) -> None:
        stage, m = self.stages[action.stage], action.microbatch
        batch, context = self.microbatches[m]
        x = None if data is None else Tensor(data, requires_grad=self.training)
        y = stage.forward(x, batch, context if self.training else None)
        if self.training:
            self.kept[action.stage, m] = x, y
        if stage.last:
            self.loss += y.item()
            self.count += stage.model.count(batch)
        else:
            self._send((action.stage + 1, FORWARD, m), y.data)

    def _backward(self, action: Action, data: Array | None) -> None:
        x, roots = self._roots(action, data)
        backward(roots)
        self._hand_back(action, x)

    def _inputs(self, action: Action, data: Array | None) -> None:
        x, roots = self._roots(action, data)
        self.later[action.stage, action.microbatch] = split_backward(roots)
        self._hand_back(action, x)

    def _weights(self, action: Action, data: Array | None) -> None:
        self.later.pop((action.stage, action.microbatch))()

    def _roots(self, action: Action, data: Array | None) -> tuple[Tensor | None, list[tuple[Tensor, Array]]]:
        x, y = self.kept.pop((action.stage, action.microbatch))
        gradient = np.full(y.shape, self.trainer.loss_gradient, y.dtype) if data is None else data
        return x, [(y, gradient)]

    def _hand_back(self, action: Action, x: Tensor | None) -> None:
        if x is not None:
            assert x.grad is not None
            self._send((action.stage - 1, BACKWARD, action.microbatch), x.grad)

    # Messages

    def _needed(self, action: Action) -> tuple[Key, int] | None:
        """The message that an action begins with, and the rank that it comes from."""
        stage = self.stages[action.stage]
        if action.kind == "F" and not stage.first:
            return (action.stage, FORWARD, action.microbatch), self.rank_of[action.stage - 1]
        if action.kind in "BI" and not stage.last:
            return (action.stage, BACKWARD, action.microbatch), self.rank_of[action.stage + 1]
        return None

    def _expect(self, action: Action) -> None:
        """Post the receive of what the action needs, if its shape is known already."""
        needed = self._needed(action)
        if needed is None or needed[0] in self.arriving or needed[1] == self.comm.rank:
            return
        key, source = needed
        if action.kind == "F":
            shape = self.shapes.get((action.stage, self._inputs_of(action.microbatch)))
        else:
            _, y = self.kept.get((action.stage, action.microbatch), (None, None))
            shape = None if y is None else y.shape
        if shape is not None:
            self.arriving[key] = self.comm.recv_async(np.empty(shape, self.dtype), source, self._tag(key))

    def _received(self, action: Action) -> Array | None:
        needed = self._needed(action)
        if needed is None:
            return None
        key, source = needed
        if key not in self.arriving:  # the first activation for inputs of this shape: its own shape comes before it
            header = self.comm.recv(np.empty(1 + MOST_DIMS, np.int64), source, self._tag((key[0], SHAPE, 0)))
            shape = tuple(header[1 : 1 + header[0]].tolist())
            self.shapes[action.stage, self._inputs_of(action.microbatch)] = shape
            self._expect(action)
        data = self.arriving.pop(key)
        return data.wait() if isinstance(data, Work) else data

    def _send(self, key: Key, data: Array) -> None:
        stage, direction, m = key
        to = self.rank_of[stage]
        if to == self.comm.rank:
            self.arriving[key] = data
            return
        first = stage, self._inputs_of(m)
        if direction == FORWARD and first not in self.told:
            self.told.add(first)
            header = np.array([data.ndim, *data.shape] + [0] * (MOST_DIMS - data.ndim), np.int64)
            self.leaving.append(self.comm.send_async(header, to, self._tag((stage, SHAPE, 0))))
        self.leaving = [work for work in self.leaving if not work.done()]
        self.leaving.append(self.comm.send_async(data, to, self._tag(key)))

    def _inputs_of(self, m: int) -> Shape:
        return tuple(self.microbatches[m][0]["inputs"].shape)

    def _tag(self, key: Key) -> int:
        stage, direction, m = key
        return (3 * (m * len(self.rank_of) + stage) + direction) % 32767
