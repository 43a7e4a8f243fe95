"""A run from its config to its adapter: restore, evaluate, train, evaluate, save.

Every rank runs this; the main rank alone writes files, logs and shows progress. What a step trains on is a
function of (config, step), so a resume needs the checkpoint and nothing else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moe_medical.adapters.folder import save_adapter
from moe_medical.adapters.model import frozen_parameters
from moe_medical.adapters.warm_start import with_labels
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.config import RunConfig, resolve_adapters
from moe_medical.config.schema import Exchange
from moe_medical.console import ProgressLine, progress_line
from moe_medical.data.loader import Loader
from moe_medical.data.tasks import TaskData
from moe_medical.distributed.state import gather_parameters, gather_state, load_state, parameter_shapes
from moe_medical.distributed.topology import Topology, peak_memory_gib
from moe_medical.errors import CheckpointMissingError, ConfigError, DataError, PreemptedError, Problem
from moe_medical.evaluation.evaluate import Evaluation
from moe_medical.planning.layout_plan import SizedLinear, exchange_chooser
from moe_medical.planning.preflight import check_context
from moe_medical.planning.sample_sizes import mixture_sizes, task_sizes
from moe_medical.tracking.meters import SpeedMeter, TaskMeter
from moe_medical.tracking.sinks import Sinks, open_sinks
from moe_medical.training.checkpoint import Checkpoint, CheckpointFolder, check_same_tensors
from moe_medical.training.data_module import Feed, agreed_batching
from moe_medical.training.guarding import Guarding
from moe_medical.training.identity import identify
from moe_medical.training.mixing import Mixing
from moe_medical.training.observer import Observer
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.run_folder import RunFolder
from moe_medical.training.setup import assemble
from moe_medical.training.step import StepResult, StopAsked, TaskFactors, TrainStep
from moe_medical.training.stopping import StopFlag

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a finished run has to show."""

    folder: RunFolder
    tasks: list[TaskData]
    before: Evaluation
    after: Evaluation
    samples_per_task: np.ndarray
    """Samples of each task that the run trained on."""
    accepted_changes: tuple[str, ...] = ()
    """Changes of the data since the run began that the user has accepted."""


class Trainer:
    """One rank of a run. Collective throughout: every rank must make the same calls."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.folder = RunFolder(Path(config.run.dir))
        self.checkpoints = CheckpointFolder(self.folder.checkpoints, config.checkpoint.keep)
        self.base = locate_base(config.model)
        check_context(config, self.base)
        self.feed = Feed(config, self.base)
        self.tasks = self.feed.tasks
        self.adapters = with_labels(resolve_adapters(config.adapters, len(self.tasks)), config.adapters)
        self.identity = identify(config, self.base, self.adapters, self.tasks, self.feed.plan)
        began = self._found_step() is not None
        self.engine, self.context = assemble(
            config, self.base, self.adapters, topology, lambda members: self._choose_exchange(members), began
        )
        over, names = config.training.balance_over, [task.name for task in self.tasks]
        self.router_losses = RouterLosses(self.engine, self.context, self.adapters, over, names)
        self.factors = TaskFactors(config, self.engine, self.context, len(self.tasks))
        self.mixing = Mixing(config, self.feed, self.engine, self.context)
        batching = agreed_batching(config.data.batching, self.engine, self.context)
        self.batches = self.feed.batches(topology, batching)
        self.guarding = Guarding(config.training.guard, self.feed, topology)
        self.stop = StopFlag()
        self.meter = TaskMeter([t.name for t in self.tasks])
        self.speed = SpeedMeter()
        self.tokens_seen = self.truncated = 0
        self.sinks = Sinks()
        what = (self.feed, self.adapters, self.engine, self.context)
        self.observer = Observer(config, *what, self.folder, self.sinks)
        self.train_step = TrainStep(
            config, self.engine, self.context, self.factors, self.router_losses, [self.observer]
        )

    def run(self) -> RunResult:
        """Train to the last step.

        Raises:
            PreemptedError: a signal asked to stop; a checkpoint of the reached step is there.
        """
        exit_code = 1
        with self.stop.listening():
            try:
                first = self._restore()
                self._open_outputs(first)
                before = self._evaluation_at(0, "evaluating before")
                last = self._train_from(first)
                self._save_checkpoint(last)
                after = self._evaluation_at(last, "evaluating after", act=False)
                self._save_adapter(last)
                exit_code = 0
            except PreemptedError as e:
                exit_code = e.exit_code
                raise
            finally:
                self.sinks.close(exit_code)
        samples = self.feed.samples(last)
        changes = self.identity.accepted_changes
        return RunResult(self.folder, self.tasks, before, after, samples, changes)

    # Setting up

    @cached_property
    def _choose_exchange(self) -> Callable[[Mapping[str, SizedLinear]], Exchange]:
        counts = self.feed.samples(self.config.training.steps)
        sizes = mixture_sizes([task_sizes(task, self.feed.chat) for task in self.tasks], counts.tolist())
        ranks = self.topology.world_size
        return exchange_chooser(self.config, self.adapters, sizes, ranks)

    def _open_outputs(self, first: int) -> None:
        if self.topology.is_main:
            self._write_from(first)
        self.topology.barrier()  # nobody reads an evaluation that is about to be forgotten
        self.observer.replay(first)

    def _write_from(self, first: int) -> None:
        last = first or -1  # a fresh start keeps nothing, not even step 0
        self.folder.forget_after(last)
        self._announce(first)
        self.folder.create(self.config)
        self.folder.write_set_aside(record for task in self.tasks for record in task.set_aside())
        self.sinks += open_sinks(self.config, self.folder.root, first)

    def _announce(self, first: int) -> None:
        trainable = sum(math.prod(shape) for shape in parameter_shapes(self.engine).values())
        where = f"{self.topology.world_size} ranks ({self.topology.source}) on {self.topology.device.type}"
        _LOG.info("%s: %s, ZeRO-%d", self.config.run.name, where, self.engine.stage)
        steps, batch = self.config.training.steps, self.config.training.global_batch
        _LOG.info("%d tasks, %s trainable parameters", len(self.tasks), f"{trainable:,}")
        _LOG.info("steps %d to %d of %d samples each; writing to %s", first, steps, batch, self.folder.root)

    # Checkpoints

    def _restore(self) -> int:
        """Bring back the newest checkpoint; returns the step to go on with, 0 for a fresh start."""
        step = self._found_step()
        if step is None:
            _LOG.info("no checkpoint in %s: starting at step 0", self.folder.checkpoints)
            return 0
        self._check_wanted(step)
        checkpoint = self.checkpoints.load(step)
        self._check_resumable(checkpoint)
        load_state(self.engine, checkpoint.trainable)
        self.tokens_seen = int(checkpoint.state["tokens"])
        self.truncated = int(checkpoint.state["truncated"])
        self.factors.load_state(checkpoint.state["task_weights"])
        self.mixing.restore(checkpoint.state["mixture"])
        self.guarding.restore(checkpoint.state["guard"])
        if self.topology.is_main:
            self.meter.sums = np.array(checkpoint.state["meter"])
        _LOG.info("resumed at step %d of %d", step, self.config.training.steps)
        if self.topology.is_main:
            for change in self.identity.accepted_changes:
                _LOG.warning("accepted: %s", change)
        return step

    def _found_step(self) -> int | None:
        """Step of the newest checkpoint, None where the run is new and may be."""
        step, root = self._agreed_newest_step(), self.folder.checkpoints
        if step is None and self.config.checkpoint.resume == "must":
            raise CheckpointMissingError(f"checkpoint.resume=must, but {root} has no valid checkpoint")
        if step is None and any(root.glob("step-*.corrupt-*")):
            raise CheckpointMissingError(
                f"every checkpoint in {root} is damaged. Use a new run.name to start anew."
            )
        return step

    def _agreed_newest_step(self) -> int | None:
        """The main rank looks, all ranks hear: two of them must not load different steps."""
        found = self.checkpoints.newest_step() if self.topology.is_main else None
        told = self.topology.sum(np.array([0.0 if found is None else found + 1.0]))[0]
        return int(told) - 1 if told else None

    def _check_wanted(self, step: int) -> None:
        problems = []
        if self.config.checkpoint.resume == "never":
            rule = f"is never, but {self.folder.checkpoints} has a checkpoint of step {step}"
            problems.append(Problem("checkpoint.resume", rule, fix="Use resume=auto or a new run.name."))
        if step > self.config.training.steps:
            rule = f"must be at least {step}, the step of the checkpoint in {self.folder.checkpoints}"
            problems.append(Problem("training.steps", rule, self.config.training.steps))
        if problems:
            raise ConfigError("the run folder", problems)

    def _check_resumable(self, checkpoint: Checkpoint) -> None:
        check_same_tensors(checkpoint, parameter_shapes(self.engine))
        accept = self.config.checkpoint.accept_data_change
        self.identity = self.identity.check_resumes(checkpoint.state["identity"], accept)
        if self.folder.read_evaluation(0) is None:
            lost = self.folder.evaluation(0)
            raise DataError(f"{lost} is lost and cannot be made again. Restore it or use a new run.name.")

    def _save_checkpoint(self, step: int) -> None:
        trainable = gather_state(self.engine, step)
        self._move_meter_to_main()
        mixture, guard = self.mixing.state(step), self.guarding.state()
        if self.topology.is_main:
            state = {
                "samples": step * self.config.training.global_batch,
                "tokens": self.tokens_seen,
                "truncated": self.truncated,
                "meter": self.meter.sums.tolist(),
                "task_weights": self.factors.state(),
                "mixture": mixture,
                "guard": guard,
                "identity": self.identity.to_json(),
            }
            layout = {
                "world_size": self.topology.world_size,
                "zero_stage": self.engine.stage,
                "ep_size": self.config.parallel.ep_size,
            }
            self.checkpoints.save(Checkpoint(trainable, state), layout)
        self.topology.barrier()

    def _move_meter_to_main(self) -> None:
        """What was measured since the last log line goes into the checkpoint as one sum."""
        self.meter.reduce(self.topology.sum)
        if not self.topology.is_main:
            self.meter.reset()

    # Training

    def _train_from(self, first: int) -> int:
        """Train on; the step that was reached, the last one unless the guard ends the run before."""
        training = self.config.training
        on_gpu = self.topology.device.type == "cuda"
        with (
            progress_line("training", training.steps, self.topology.is_main) as progress,
            self.feed.loader(self.batches, pin=on_gpu) as loader,
        ):
            progress.advance(first)
            for step in range(first, training.steps):
                if self._due(self.config.evaluation.every_steps, step):
                    scores = self.config.evaluation.scores == "always"
                    self._evaluation_at(step, f"evaluating at step {step}", scores)
                if not self.guarding.stopped:
                    self._decide_mixture(step)
                if self.guarding.stopped:
                    return step
                self.speed.restart()
                self._one_step(step, loader, progress)
                if self._due(self.config.checkpoint.every_steps, step + 1):
                    self._save_checkpoint(step + 1)
        return training.steps

    def _decide_mixture(self, done: int) -> None:
        label = f"evaluating at step {done}"
        decision = self.mixing.step_done(done, lambda: self._evaluation_at(done, label, scores=False))
        if decision is not None and self.topology.is_main:
            self.observer.tell_decisions([decision], self.tokens_seen)

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and done % every == 0 and 0 < done < self.config.training.steps

    def _one_step(self, step: int, loader: Loader, progress: ProgressLine) -> None:
        self.factors.guard_T = self.guarding.factors_T
        self.observer.before_step(step)
        batches = loader.take(step, self.config.training.steps)
        try:
            result = self.train_step(step, batches, self.stop.asked)
        except StopAsked:
            self._stop_at(step)
        counts = result.counts
        self.tokens_seen += counts.all_tokens
        self.meter.sums += result.task_sums.T
        self.mixing.add(result.task_sums)
        self.guarding.add(result.task_sums)
        self.truncated += counts.truncated
        self.speed.step(counts.all_tokens, counts.positions, loader.waited())
        note = ""
        is_last = result.done == self.config.training.steps
        if result.done % self.config.tracking.log_every_steps == 0 or is_last:
            note = self._note(self._log_step(result))
        self.observer.step_done(result.done, self.tokens_seen)
        progress.advance(1, note)

    def _log_step(self, result: StepResult) -> float:
        self.meter.reduce(self.topology.sum)
        rows = self.meter.rows
        samples = sum(r.samples for r in rows.values())
        loss = sum(r.loss * r.samples for r in rows.values()) / samples
        values = {f"train_loss/{task}": row.loss for task, row in rows.items()}
        values |= {
            "loss": loss,
            "tokens": self.tokens_seen,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "step_seconds": self.speed.last_step_seconds,
            "tokens_per_second": self.speed.tokens_per_second,
            "health/useful_positions": self.speed.useful_positions,
            "health/data_wait_seconds": self.speed.data_wait_seconds,
            "health/truncated_prompts": self.truncated,
            "health/memory_gib": peak_memory_gib(self.topology.device),
        }
        values |= {f"router_loss/{name}": value for name, value in self.router_losses.values().items()}
        values |= self.feed.shares(result.done)
        if (result.factors_T != 1).any():
            factors = zip(self.tasks, result.factors_T.tolist(), strict=True)
            values |= {f"loss_weight/{task.name}": factor for task, factor in factors}
        self.sinks.log(values, result.done)
        self.meter.reset()
        return loss

    def _note(self, loss: float) -> str:
        return f"loss {loss:.3f}  {self.speed.tokens_per_second:.0f} tokens/s"

    def _stop_at(self, step: int) -> NoReturn:
        if step > 0:
            self._save_checkpoint(step)
        raise PreemptedError(
            f"stopped after step {step} of {self.config.training.steps}; run the same command to go on"
        )

    # Results

    def _evaluation_at(self, step: int, label: str, scores: bool = True, act: bool = True) -> Evaluation:
        def poll() -> None:
            if self.topology.sum(np.array([float(self.stop.asked)]))[0]:
                self._stop_at(step)

        evaluation = self.observer.evaluate(step, label, self.tokens_seen, poll, scores)
        decisions = self.guarding.look(step, self.observer.seen) if act else ()
        if self.topology.is_main:
            self.observer.tell_decisions(decisions, self.tokens_seen)
        return evaluation

    def _save_adapter(self, steps: int) -> None:
        state = gather_parameters(self.engine)
        if self.topology.is_main:
            meta = adapter_meta(self.config, self.base, self.tasks, steps)
            whole = frozen_parameters(self.engine.module) | state
            save_adapter(self.folder.adapter, whole, self.adapters, meta)
        self.topology.barrier()


def adapter_meta(config: RunConfig, base: BaseModel, tasks: list[TaskData], steps: int) -> dict[str, Any]:
    """What a user of the adapter must know beside its weights."""
    # Options of other kinds of tasks differ by row: they are text of records, not labels.
    closed = [t for t in tasks if t.spec.kind in ("classification", "yes_no")]
    labels = {t.name: sorted(t.train.distinct_choices()) for t in closed}
    return {
        "base_model": base.name,
        "base_revision": base.revision,
        "tasks": [t.name for t in tasks],
        "label_sets": {name: values for name, values in labels.items() if values},
        "system_prompt": config.data.system_prompt,
        "max_length": config.data.max_length,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "seed": config.run.seed,
        "steps": steps,
    }
