"""The folder of a run: what is written, by whom, and how a later start goes on from it.

    runs/<name>/config.yaml       resolved                    metrics.jsonl    a line per logged step
                checkpoints/      step_00000100, …            summary.json     what came out
                loss.svg          the loss curve              sample.txt       generated text
                tokenizer.json    from text to ids and back   trace.json       with log.trace: who did what when

Rank 0 writes; every rank writes its part of a checkpoint. Files are written whole or, line by line, appended to.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dtrain import cache, checkpoint
from dtrain.config import GPTConfig
from dtrain.errors import UserError
from dtrain.kernels.memory import peak_memory
from dtrain.launch import configuration, experts, memory, pictures, timelines
from dtrain.launch.progress import logs
from dtrain.launch.trace import WARM, Trace
from dtrain.launch.versions import versions
from dtrain.models import Model
from dtrain.trainer import StepRecord, Trainer


class RunFolder:
    """The files of a run. Only rank 0 writes them, checkpoints excepted."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        self.path, self.trainer = path, trainer
        self.comm = trainer.mesh.comm
        self.checkpoints = path / "checkpoints"
        self.metrics: list[dict[str, Any]] = []
        self.peaks: list[int] = []
        self.start_step = 0
        self.finished = False
        """Trained to the last step and told about by an earlier start: nothing is left to do."""
        self._since: list[StepRecord] = []
        self.memory = memory.kept(trainer)
        self.more: dict[str, Any] = {}
        """What else summary.json is to tell."""

    def open(self, source: Path) -> list[str]:
        """Make the folder, continue an earlier run if asked; returns what to tell about it."""
        config, trainer = self.trainer.config, self.trainer
        start = self._start(config.checkpoint.resume)
        told = []
        if start is not None:
            trainer.load(start)
            told.append(f"resumed from {start}: step {trainer.step} of {trainer.total_steps}")
            told += self._changes(checkpoint.Reader(start).state)
            self.start_step = trainer.step
            self.finished = self.comm.broadcast_object(self._told_steps()) >= trainer.step >= trainer.total_steps
        if self.finished:
            told[0] = (
                f"finished already: {start}, step {trainer.step} of {trainer.total_steps}. Nothing was trained or "
                "changed; a larger train.steps goes on from here, another `name` starts anew"
            )
        elif self.comm.rank == 0:
            self._write_text("config.yaml", configuration.dump(config))
            if trainer.data.tokenizer is not None:
                trainer.data.tokenizer.save(self.path / "tokenizer.json")  # the text may be gone when it is needed
            self._rewind()
        return told

    def _start(self, resume: str) -> Path | None:
        """The checkpoint to go on from; rank 0 looks and all others follow."""
        answer: dict[str, str | None] = {"folder": None, "error": None}
        if self.comm.rank == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                found = checkpoint.latest(self.checkpoints) if resume in ("auto", "never") else Path(resume)
                if resume == "never" and found is not None:
                    raise UserError(
                        f"checkpoint.resume: never, but {self.checkpoints} holds a checkpoint ({found.name}) that "
                        "would be lost. Use another `name`, remove the folder, or set checkpoint.resume=auto"
                    )
                answer["folder"] = None if found is None else str(found)
            except UserError as error:
                answer["error"] = str(error)
            except OSError as error:
                answer["error"] = f"output: {self.path}: {error.strerror}; it must be a folder that can be written"
        answer = self.comm.broadcast_object(answer)
        if answer["error"] is not None:
            raise UserError(answer["error"])
        return None if answer["folder"] is None else Path(answer["folder"])

    def _changes(self, state: dict[str, Any]) -> Iterator[str]:
        """What makes the steps to come others than those of the run that wrote the checkpoint."""
        seed, before = self.trainer.config.seed, state.get("seed", "not told")
        if before != seed:
            yield f"note: seed is {seed} now, was {before}: the steps to come see the data in another order"
        if state.get("data") != self.trainer.data.fingerprint:
            yield "note: the data is not what the checkpoint was trained on"

    def _told_steps(self) -> int:
        """The steps that summary.json tells about; 0 without one."""
        try:
            return int(json.loads((self.path / "summary.json").read_text())["steps"])
        except (OSError, ValueError, KeyError):
            return 0

    def _rewind(self) -> None:
        """Keep the lines of metrics.jsonl that belong to the steps before this start."""
        path = self.path / "metrics.jsonl"
        self.metrics = []
        if path.exists() and self.trainer.step:
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a run that was killed while writing it
                    row = json.loads(line)
                    if row["step"] <= self.trainer.step:
                        self.metrics.append(row)
        self._write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.metrics))

    def record(self, record: StepRecord) -> None:
        """Take note of a step; those that `logs` names and those with a validation are written to metrics.jsonl.
        Collective."""
        self._since.append(record)
        trainer = self.trainer
        named = logs(record.step, trainer.config.log.every, self.start_step, trainer.total_steps)
        if not named and record.validation_loss is None:
            return
        seconds = sum(each.step_seconds for each in self._since)
        row: dict[str, Any] = {
            "step": record.step,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "tokens_per_second": sum(each.tokens for each in self._since) / seconds,
            "step_seconds": seconds / len(self._since),
            "tokens": record.step * self.trainer.expected_targets,
            "memory_bytes": self._largest(peak_memory()),
        }
        if record.skipped_steps is not None:
            row["grad_norm"] = record.grad_norm if math.isfinite(record.grad_norm) else None  # JSON has no inf
            row |= {"loss_scale": record.loss_scale, "skipped_steps": record.skipped_steps}
        if record.validation_loss is not None:
            row["validation_loss"] = record.validation_loss
            row |= {name: value if math.isfinite(value) else None for name, value in record.measures.items()}
        if record.details:
            row["experts"] = record.details
        self._since.clear()
        self.metrics.append(row)
        if self.comm.rank == 0:
            self._append(json.dumps(row) + "\n")

    def _largest(self, number: int) -> int:
        with self.comm.counters.purpose("log"):
            return int(self.comm.all_reduce(np.array([number]), "max")[0])

    def measure(self) -> None:
        """Ask every rank for the most memory it ever had, for summary.json. Collective."""
        with self.comm.counters.purpose("log"):
            self.peaks = [int(peak) for peak in self.comm.all_gather(np.array([peak_memory()]))]

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        config = self.trainer.config
        model = {**msgspec.to_builtins(config.model), "data_vocabulary": self.trainer.data.vocabulary}
        extra = {"model": model, "layout": self.trainer.mesh.sizes}
        with self.comm.counters.purpose("checkpoint"):
            self.trainer.save(self.checkpoints, config.checkpoint.keep, extra)

    def trace(self, trace: Trace) -> list[str]:
        """Write trace.json, if any step was recorded; returns what to tell. Collective."""
        if not self.trainer.config.log.trace:
            return []
        found = trace.told()
        if found is None:
            return [f"log.trace: no trace: the first {WARM} steps of a start are not recorded, and there were no more"]
        text, self.more["trace"], table = found
        if self.comm.rank == 0:
            self._write_text("trace.json", text)
        recorded = f"trace of steps {trace.recorded[0]} to {trace.recorded[-1]}"
        return [f"{recorded}: {self.path / 'trace.json'}; open it in https://ui.perfetto.dev", *table]

    def speaker(self) -> Model | None:
        """The model that writes the sample at the end, on rank 0; None where there is no text to write. Collective."""
        trainer = self.trainer
        if (
            not isinstance(trainer.config.model, GPTConfig)
            or trainer.data.tokenizer is None
            or not trainer.config.sample.tokens
        ):
            return None
        from dtrain.launch.sample import assembled

        with self.comm.counters.purpose("sample"):
            return assembled(trainer)

    def close(
        self,
        seconds: float,
        first_step: float | None,
        collectives: list[dict[str, Any]] | None = None,
        timeline: dict[str, Any] | None = None,
        speaker: Model | None = None,
    ) -> Iterator[str]:
        """Write summary, picture and sample; returns what to tell. Every rank calls it, rank 0 does it.

        collectives: what was communicated, per step, as `Traffic.rows` has it. timeline, speaker: of `measured` and
        `speaker`.
        """
        if self.comm.rank != 0:
            return
        trainer, config = self.trainer, self.trainer.config
        last = self.metrics[-1] if self.metrics else {}
        validation = [row["validation_loss"] for row in self.metrics if "validation_loss" in row]
        summary = {
            "name": config.name,
            "steps": trainer.step,
            "final_loss": last.get("loss"),
            "final_validation_loss": validation[-1] if validation else None,
            "unigram_entropy": trainer.data.entropy,
            "tokens": last.get("tokens", 0),
            "seconds": seconds,
            "first_step_at": first_step,
            "parameters": trainer.num_parameters,
            "peak_memory_bytes_per_rank": self.peaks,
            "layout": {"ranks": self.comm.size, **trainer.mesh.sizes, "data_parallel": config.parallel.data_parallel},
            "memory": self.memory,
            "pipeline": timeline,
            "collectives": collectives or [],
            "versions": versions(self.comm),
            **self.more,
        }
        if timeline is not None:
            self._write_text("pipeline.svg", timeline.pop("svg"))
            yield timelines.told(timeline, self.path / "pipeline.svg", self.comm.size)
        self._write_text("summary.json", json.dumps(summary, indent=2) + "\n")
        if len(self.metrics) > 1:
            picture = pictures.loss_curve(
                self.metrics, self.path / "loss.svg", trainer.data.entropy, f"{config.name}: loss in nats per target"
            )
            yield ""
            yield pictures.terminal_curve([row["loss"] for row in self.metrics])
            yield f"loss curve: {picture}"
        if drawn := experts.picture(self.metrics, self.path / "experts.svg", f"{config.name}: loads of the experts"):
            yield f"loads of the experts: {drawn}"
        if validation:
            verdict = "below" if validation[-1] < trainer.data.entropy else "NOT below"
            measure = (
                "entropy of the classes" if config.model.kind in ("mlp", "dlrm") else "unigram entropy of the text"
            )
            yield (f"validation loss {validation[-1]:.4f}, {verdict} the {measure}, {trainer.data.entropy:.4f}")
        yield from self._sample(speaker)
        yield memory.peak_line(self.peaks)
        yield f"trained {trainer.step} steps in {seconds:.1f} s; everything is in {self.path}/"

    def _sample(self, speaker: Model | None) -> Iterator[str]:
        trainer, options = self.trainer, self.trainer.config.sample
        if not isinstance(trainer.config.model, GPTConfig) or trainer.data.tokenizer is None or not options.tokens:
            return
        if speaker is None:
            yield f"a sample of its text, from a process that has room for the whole model: dtrain sample {self.path}"
            return
        from dtrain.launch.sample import generate

        text = generate(
            speaker,
            trainer.data.tokenizer,
            options.prompt,
            options.tokens,
            temperature=options.temperature,
            top_k=None,
            seed=trainer.config.seed,
        )
        self._write_text("sample.txt", text + "\n")
        yield "a sample of its text:"
        yield from ("  | " + line for line in text.splitlines())

    def _append(self, line: str) -> None:
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise self._unwritable(path, error) from None

    def _write_text(self, name: str, text: str) -> None:
        try:
            cache.write_atomic(self.path / name, text.encode())
        except OSError as error:
            raise self._unwritable(self.path / name, error) from None

    def _unwritable(self, path: Path, error: OSError) -> UserError:
        free = shutil.disk_usage(self.path).free
        return UserError(f"output: cannot write {path}: {error.strerror} ({free:,} bytes free)")
