"""A run from its config to its adapter: restore, evaluate, train, evaluate, save.

Every rank runs this; the main rank alone writes files, logs and shows progress. What a step trains on is a
function of (config, step), so a resume needs the checkpoint and nothing else. A step itself is `TrainStep`'s;
what looks at it, and what is done about a task, are callbacks.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moe_medical.adapters.folder import save_adapter
from moe_medical.adapters.model import frozen_parameters
from moe_medical.adapters.warm_start import labels_of
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.config import RunConfig
from moe_medical.console import progress_line
from moe_medical.data.tasks import TaskData
from moe_medical.distributed.expert_parallel import Chooser
from moe_medical.distributed.state import gather_parameters, gather_state, load_state, parameter_shapes
from moe_medical.distributed.topology import Topology
from moe_medical.errors import CheckpointMissingError, ConfigError, DataError, PreemptedError, Problem
from moe_medical.evaluation.evaluate import Evaluation, Evaluator
from moe_medical.planning.layout_plan import exchange_chooser
from moe_medical.planning.preflight import check_context
from moe_medical.tracking.sinks import open_sinks
from moe_medical.training.checkpoint import Checkpoint, CheckpointFolder, check_same_tensors
from moe_medical.training.data_module import DataModule, agreed_batching
from moe_medical.training.fingerprint import run_fingerprint
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.run_folder import RunFolder
from moe_medical.training.run_log import RunLog
from moe_medical.training.setup import assemble, build_callbacks
from moe_medical.training.step import StopAsked, TaskFactors, TrainStep
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
    """One rank of a run. Collective throughout: every rank must make the same calls.

    Args:
        config: The run.
        topology: This process among all.

    Raises:
        MoeMedicalError: the run cannot be started, or must not be resumed.
    """

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.folder = RunFolder(Path(config.run.dir))
        self.checkpoints = CheckpointFolder(self.folder.checkpoints, config.checkpoint.keep)
        self.base = locate_base(config.model)
        check_context(config, self.base)
        self.data = DataModule(config, self.base)
        self.tasks = self.data.tasks
        self.adapters = config.adapters.for_tasks(len(self.tasks), labels_of(config.adapters))
        self.fingerprint = run_fingerprint(config, self.base, self.adapters, self.tasks, self.data.plan)
        self._found_step = self._find_checkpoint()

        began = self._found_step is not None
        self.engine, self.context = assemble(
            config, self.base, self.adapters, topology, self._exchange_chooser(), began
        )
        batching = agreed_batching(config.data.batching, self.engine, self.context)
        self.batches = self.data.batches(topology, batching)
        self.loader = self.data.loader(self.batches, pin=topology.device.type == "cuda")
        self.evaluator = Evaluator(
            self.tasks,
            self.data.chat,
            config.evaluation,
            topology,
            self.engine.needs_equal_forwards,
            self.context,
        )
        over = config.training.balance_over
        names = [task.name for task in self.tasks]
        self.router_losses = RouterLosses(self.engine, self.context, self.adapters, over, names)
        self.factors = TaskFactors(config, self.engine, self.context, len(self.tasks))
        self.stop = StopFlag()
        self.log = RunLog(self.folder, topology.is_main)
        self.callbacks = build_callbacks(
            config,
            self.data,
            self.adapters,
            self.engine,
            self.context,
            self.loader,
            self.factors,
            self.router_losses,
            self.log,
        )
        self.train_step = TrainStep(
            config, self.engine, self.context, self.factors, self.router_losses, self.callbacks
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
                before = self.evaluate(0, "evaluating before")
                last = self._train_from(first)
                self._save_checkpoint(last)
                after = self.evaluate(last, "evaluating after")
                self._save_adapter(last)
                exit_code = 0
            except PreemptedError as e:
                exit_code = e.exit_code
                raise
            finally:
                self.log.sinks.close(exit_code)
        samples = self.data.samples(last)
        changes = self.fingerprint.accepted_changes
        return RunResult(self.folder, self.tasks, before, after, samples, changes)

    # Setting up

    def _exchange_chooser(self) -> Chooser:
        """What `parallel.exchange` means for layers that share an input; measuring samples takes a while."""
        parallel = self.config.parallel
        if parallel.ep_size > 1 and parallel.exchange == "auto":
            sizes = self.data.sample_sizes()
            return exchange_chooser(self.config, self.adapters, sizes, self.topology.world_size)
        return lambda members: parallel.exchange

    def _open_outputs(self, first: int) -> None:
        if self.topology.is_main:
            if first:
                self.folder.forget_after(first)
            else:
                self.folder.put_earlier_away()
            self._announce(first)
            self.folder.create(self.config)
            self.folder.write_rejected(record for task in self.tasks for record in task.rejected())
            self.log.sinks += open_sinks(self.config, self.folder.root, first)
        self.topology.barrier()  # nobody reads an evaluation that is about to be forgotten
        for callback in self.callbacks:
            callback.start(first)

    def _announce(self, first: int) -> None:
        trainable = sum(math.prod(shape) for shape in parameter_shapes(self.engine).values())
        ranks = f"{self.topology.world_size} ranks ({self.topology.source}) on {self.topology.device.type}"
        _LOG.info("%s: %s, ZeRO-%d", self.config.run.name, ranks, self.engine.stage)
        steps = self.config.training.steps
        batch = self.config.training.global_batch
        _LOG.info("%d tasks, %s trainable parameters", len(self.tasks), f"{trainable:,}")
        if idle := self.adapters.idle_router():
            _LOG.warning("%s", idle)
        _LOG.info("steps %d to %d of %d samples each; writing to %s", first, steps, batch, self.folder.root)

    # Checkpoints

    def _find_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, None where the run is new and may be."""
        root = self.folder.checkpoints
        # The main rank looks and all ranks are told: two of them must not load different steps.
        found = self.checkpoints.recover() if self.topology.is_main else None
        step = int(self.topology.from_main(np.array(-1 if found is None else found)))
        if step >= 0:
            return step
        if self.config.checkpoint.resume == "must":
            raise CheckpointMissingError(f"checkpoint.resume=must, but {root} has no valid checkpoint")
        if any(root.glob("step-*.corrupt-*")):
            raise CheckpointMissingError(
                f"every checkpoint in {root} is damaged. Use a new run.name to start anew."
            )
        logged = self.folder.last_logged_step()
        if logged > (self.config.checkpoint.every_steps or self.config.training.steps - 1):
            raise CheckpointMissingError(
                f"{self.folder.metrics} tells of step {logged}, but {root} has no checkpoint. "
                "Is a volume not mounted? Bring the checkpoints back, or use a new run.name."
            )
        return None

    def _restore(self) -> int:
        """Bring back the checkpoint that was found; returns the step to go on with, 0 for a fresh start."""
        step = self._found_step
        if step is None:
            _LOG.info("no checkpoint in %s: starting at step 0", self.folder.checkpoints)
            return 0
        self._check_wanted(step)
        checkpoint = self.checkpoints.load(step)
        state = checkpoint.state
        self._check_resumable(checkpoint)
        load_state(self.engine, checkpoint.trainable)
        self.log.tokens = int(state["tokens"])
        self.factors.load_state(state["task_weights"])
        for callback in self.callbacks:
            if callback.name in state["callbacks"]:
                callback.load_state(state["callbacks"][callback.name])
        _LOG.info("resumed at step %d of %d", step, self.config.training.steps)
        if self.topology.is_main:
            for change in self.fingerprint.accepted_changes:
                _LOG.warning("accepted: %s", change)
        return step

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
        self.fingerprint = self.fingerprint.check_resumes(checkpoint.state["fingerprint"], accept)
        if self.folder.read_evaluation(0) is None:
            lost = self.folder.evaluation(0)
            raise DataError(f"{lost} is lost and cannot be made again. Restore it or use a new run.name.")

    def _save_checkpoint(self, step: int) -> None:
        trainable = gather_state(self.engine, step)
        callbacks = {callback.name: callback.state(step) for callback in self.callbacks if callback.name}
        if self.topology.is_main:
            state = {
                "samples": step * self.config.training.global_batch,
                "tokens": self.log.tokens,
                "task_weights": self.factors.state(),
                "fingerprint": self.fingerprint.to_json(),
                "callbacks": callbacks,
            }
            layout = {
                "world_size": self.topology.world_size,
                "zero_stage": self.engine.stage,
                "ep_size": self.config.parallel.ep_size,
            }
            self.checkpoints.save(Checkpoint(trainable, state), layout)
        self.topology.barrier()

    # Training

    def _train_from(self, first: int) -> int:
        """Train on; the step that was reached, the last one unless a callback ends the run before."""
        steps = self.config.training.steps
        with progress_line("training", steps, self.topology.is_main) as progress, self.loader:
            progress.advance(first)
            for step in range(first, steps):
                self._evaluate_where_due(step)
                if any(callback.ends_run for callback in self.callbacks):
                    return step
                row = self._one_step(step)
                note = (
                    f"loss {row['loss']:.3f}  {row['tokens_per_second']:.0f} tokens/s"
                    if "loss" in row
                    else ""
                )
                progress.advance(1, note)
                if self._due(self.config.checkpoint.every_steps, step + 1):
                    self._save_checkpoint(step + 1)
        return steps

    def _one_step(self, step: int) -> dict[str, float]:
        """One step with all that looks at it; the series that it has logged."""
        for callback in self.callbacks:
            callback.before_step(step)
        batches = self.loader.take(step, self.config.training.steps)
        try:
            result = self.train_step(step, batches, self.stop.asked)
        except StopAsked:
            self._stop_at(step)
        self.log.tokens += result.counts.all_tokens
        row: dict[str, float] = {}
        for callback in self.callbacks:
            row |= callback.after_step(result)
        self.log.row(row, result.done)
        return row

    def _due(self, every: int, done: int) -> bool:
        """Whether it is due in the middle of the run; its ends are seen to by `run`."""
        return every > 0 and done % every == 0 and 0 < done < self.config.training.steps

    def _stop_at(self, step: int) -> NoReturn:
        if step > 0:
            self._save_checkpoint(step)
        raise PreemptedError(
            f"stopped after step {step} of {self.config.training.steps}; run the same command to go on"
        )

    # Evaluations

    def _evaluate_where_due(self, step: int) -> None:
        label = f"evaluating at step {step}"
        section = self.config.evaluation
        if self._due(section.every_steps, step):
            self.evaluate(step, label, section.scores == "always")
        elif any(callback.wants_evaluation(step) for callback in self.callbacks):
            self.evaluate(step, label, scores=False)

    def evaluate(self, step: int, label: str, scores: bool = True) -> Evaluation:
        """The evaluation after `step` steps, which all callbacks see.

        A resumed run reads it back instead of repeating it.

        Args:
            step: Optimizer steps done.
            label: Of the progress line.
            scores: Whether answers are made and scored too.

        Raises:
            PreemptedError: a signal asked to stop.
        """
        evaluation = self.folder.read_evaluation(step)
        if evaluation is not None and scores and self.evaluator.makes_scores:
            evaluation = evaluation if evaluation.macro_score is not None else None
        # All ranks read it back, or none: measuring is collective.
        is_new = self.topology.sum(np.array(evaluation is not None)) < self.topology.world_size
        if evaluation is None or is_new:
            evaluation = self._measure(step, label, scores)
        for callback in self.callbacks:
            callback.after_evaluation(evaluation, bool(is_new))
        if is_new:  # the file comes last: where it is, its series are
            if self.topology.is_main:
                self.folder.write_evaluation(evaluation)
            self.topology.barrier()
        return evaluation

    def _measure(self, step: int, label: str, scores: bool) -> Evaluation:
        total = self.evaluator.num_batches(scores)
        with progress_line(label, total, self.topology.is_main) as progress:

            def advance() -> None:
                progress.advance()
                if self.topology.sum(np.array(self.stop.asked)):
                    self._stop_at(step)

            return self.evaluator.run(self.engine.module, step, advance, scores)

    # The result

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
