"""One optimizer step, the same for a run, a test and a benchmark.

    count  ->  weigh  ->  forward and backward of each micro-batch  ->  the engine's step

Samples, weights of tokens and router statistics are counted over all ranks and micro-batches before the first
backward, so that the step depends on neither. Here is no loader, no progress and no log: `Trainer` feeds the
step, and the callbacks look at its result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_medical.adapters.routing import RoutingContext
from moe_medical.config import RunConfig
from moe_medical.config.schema import TrainingSection
from moe_medical.data.batches import Batch
from moe_medical.distributed.engine import Engine
from moe_medical.evaluation.loss import TokenWeights, forward_context, task_sums, token_losses
from moe_medical.training.callback import Callback
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.router_paths import RouterPaths
from moe_medical.training.surgery import surgery_weights
from moe_medical.training.task_weights import task_weighting


class StopAsked(Exception):
    """A rank was asked to stop. Raised on every rank at the same point, before anything of a step is done."""


@dataclass(frozen=True)
class StepCounts:
    """What all ranks agree on before the first backward of a step."""

    tokens_T: np.ndarray
    """Supervised tokens of each task in the global step."""
    rows_T: np.ndarray
    """Samples of each task in the global step."""
    all_tokens: int
    """Tokens of the global step, prompts included, padding not."""
    truncated: int
    """Samples of the global step whose prompt was cut to fit."""
    positions: int
    """Positions that the global step computes, padding included."""
    stop: bool
    """Whether any rank was asked to stop."""


@dataclass(frozen=True)
class StepResult:
    """What a step has done, as every rank knows it without asking the others."""

    step: int
    """Counted from 0."""
    task_sums: np.ndarray
    """Of this rank, by task: loss (nats), supervised tokens, samples; float64, shape (3, num_tasks)."""
    counts: StepCounts
    """Of all ranks."""
    grad_norm: float
    """Of all ranks, before clipping; not finite where the step was skipped."""
    learning_rate: float
    factors_T: np.ndarray
    """What each task's loss was multiplied with, beside the normalisation."""

    @property
    def is_applied(self) -> bool:
        """Whether anything was updated: not where a gradient was not finite. The same on all ranks."""
        return math.isfinite(self.grad_norm)

    @property
    def done(self) -> int:
        """Steps done, this one included."""
        return self.step + 1


class TrainStep:
    """Does one step after the other. Collective: every rank must make the same calls.

    Args:
        config: The run: loss, clipping, learning rates, router paths, seed.
        engine: That collects gradients and updates.
        context: Of the engine's layers.
        factors: Weights of the tasks; learn from each step.
        router_losses: Enter in each backward.
        callbacks: May look at a micro-batch between its forward and its backward.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        context: RoutingContext,
        factors: TaskFactors,
        router_losses: RouterLosses,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._training = config.training
        self._seed = config.run.seed
        self._engine = engine
        self._context = context
        self._factors = factors
        self._router_losses = router_losses
        self._callbacks = callbacks
        self._paths = RouterPaths(config.training.router_paths, config.training.router_paths_reduce)

    def __call__(self, step: int, batches: Sequence[Batch], stop: bool = False) -> StepResult:
        """One step on this rank's micro-batches of it.

        What it does is a function of the run file, the parameters, the step's number and its batches: dropout
        is seeded here, so that a resumed run needs no generator's state.

        Args:
            step: Counted from 0.
            batches: This rank's, as many as every other rank has; on the CPU.
            stop: Whether this rank was asked to stop.

        Raises:
            StopAsked: any rank was.
        """
        engine = self._engine
        num_tasks = self._factors.num_tasks
        torch.manual_seed(step_seed(self._seed, step, engine.topology.rank))
        counts = count_step(engine, batches, num_tasks, stop)
        if counts.stop:
            raise StopAsked

        batches = [batch.to(engine.topology.device) for batch in batches]
        normalise = self._training.loss.normalise
        device = engine.topology.device
        plain = TokenWeights.of(normalise, counts.tokens_T, counts.rows_T, device)
        factors_T = self._factors.of_step(step, batches, counts, plain)
        weights = plain.times(factors_T)

        # The router losses take all passes of a sample alike, so they see its rows as often as it runs.
        repeated = [self._paths.repeat(batch) for batch in batches]
        self._router_losses.begin_step(repeated, counts.all_tokens * self._paths.number)
        sums = np.zeros((3, num_tasks))
        for number, (batch, rows) in enumerate(zip(batches, repeated, strict=True), start=1):
            # Bound until backward is through: activation checkpointing runs the forward again in there.
            with forward_context(self._context, rows):
                tokens = self._paths.choose(token_losses(engine, rows), batch)
                for callback in self._callbacks:
                    callback.after_forward()
                self._router_losses.enter()
                engine.backward((tokens.losses * weights(tokens)).sum(), last=number == len(batches))
            sums += task_sums(tokens, batch, num_tasks).numpy()

        rate = learning_rate(self._training, step)
        norm = engine.step(rate)
        result = StepResult(step, sums, counts, norm, rate, factors_T)
        if result.is_applied:  # weights that follow losses would not come back from one that is not finite
            self._factors.learn(step, batches, counts, sums[0])
        return result


class TaskFactors:
    """What each task's loss is multiplied with: by task weights or surgery, and by the guard.

    With the defaults it costs nothing and all factors are 1.

    Args:
        config: The run.
        engine: That does the steps.
        context: Of its layers.
        num_tasks: T.

    Attributes:
        guard_T: More factors, until they are changed.
    """

    def __init__(self, config: RunConfig, engine: Engine, context: RoutingContext, num_tasks: int) -> None:
        self._section = config.training.loss
        self._seed = config.run.seed
        self._engine = engine
        self._context = context
        self.num_tasks = num_tasks
        self._weighting = task_weighting(self._section, num_tasks)
        self.guard_T = np.ones(num_tasks)

    def of_step(
        self, step: int, batches: Sequence[Batch], counts: StepCounts, plain: TokenWeights
    ) -> np.ndarray:
        """The factors of a step, (T,). They rest on earlier steps, but for those of surgery.

        Args:
            step: Counted from 0.
            batches: This rank's micro-batches, on the device.
            counts: Of all ranks.
            plain: Weights of the target tokens without the factors.
        """
        if self._section.surgery == "none":
            factors_T = self._weighting.weights()
        else:
            factors_T = surgery_weights(
                self._section.surgery,
                self._engine,
                self._context,
                batches,
                plain,
                self.num_tasks,
                self._seed + step,
            )
        return factors_T * self.guard_T

    def learn(self, step: int, batches: Sequence[Batch], counts: StepCounts, losses_T: np.ndarray) -> None:
        """Let the task weights learn from a step that is done; arguments as of `of_step`.

        Args:
            step: Counted from 0.
            batches: On the device.
            counts: Of all ranks.
            losses_T: This rank's summed token losses of each task, of the step's own forward passes.
        """
        if self._section.task_weights == "none":
            return
        before_T = self._mean(losses_T, counts)
        looks = self._weighting.needs_second_look
        after_T = self._mean(self._second_look(step, batches), counts) if looks else None
        self._weighting.observe(before_T, after_T)

    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps."""
        return self._weighting.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._weighting.restore(state)

    def _mean(self, losses_T: np.ndarray, counts: StepCounts) -> np.ndarray:
        """Loss per target token of each task over all ranks; NaN for absent ones."""
        tokens_T = np.where(counts.tokens_T > 0, counts.tokens_T, np.nan)
        return np.asarray(self._engine.topology.sum(losses_T.copy()) / tokens_T)

    # The module, not the engine: DeepSpeed counts the engine's forward passes as part of a step.
    @torch.no_grad()
    def _second_look(self, step: int, batches: Sequence[Batch]) -> np.ndarray:
        """This rank's summed token losses of each task now, with the dropout that the step had."""
        sums_T = np.zeros(self.num_tasks)
        torch.manual_seed(step_seed(self._seed, step, self._engine.topology.rank))
        for batch in batches:
            with forward_context(self._context, batch, "count"):
                tokens = token_losses(self._engine.module, batch)
            sums_T += task_sums(tokens, batch, self.num_tasks).numpy()[0]
        return sums_T


def count_step(engine: Engine, batches: Sequence[Batch], num_tasks: int, stop: bool) -> StepCounts:
    """Sum this step's counts, and the stop flags, over all ranks. Collective: every rank must call."""
    # All in one array: one collective a step, however much there is to agree on.
    mine = np.zeros(2 * num_tasks + 4)
    for batch in batches:
        mine[:num_tasks] += batch.targets_per_task(num_tasks).numpy()
        mine[num_tasks : 2 * num_tasks] += batch.samples_per_task(num_tasks).numpy()
        mine[-4] += batch.num_tokens
        mine[-3] += batch.num_truncated
        mine[-2] += batch.input_ids_BS.numel()
    mine[-1] = stop
    everyone = engine.topology.sum(mine)
    tokens = everyone[:num_tasks]
    rows = everyone[num_tasks : 2 * num_tasks]
    all_tokens, truncated, positions, stops = everyone[2 * num_tasks :].astype(int).tolist()
    return StepCounts(tokens, rows, all_tokens, truncated, positions, bool(stops))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of all that a rank draws in a step; dropout is a function of (seed, step, rank)."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def learning_rate(section: TrainingSection, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then the schedule down to zero at the end.

    A pure function of the step: nothing to checkpoint, the same after a resume.
    """
    warmup = math.ceil(section.warmup_ratio * section.steps)
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(section.steps - warmup, 1)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return section.learning_rate * shape[section.schedule]
