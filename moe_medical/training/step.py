"""One optimizer step: this rank's micro-batches, weighted so that all ranks make the global loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_medical.adapters.routing import RoutingContext
from moe_medical.data.batches import Batch
from moe_medical.distributed.engine import Engine
from moe_medical.evaluation.loss import TokenWeights, task_sums, token_losses
from moe_medical.training.binding import bind_batch
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.router_paths import ONE_PATH, RouterPaths


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


def count_step(engine: Engine, batches: Sequence[Batch], num_tasks: int, stop: bool) -> StepCounts:
    """Sum this step's counts, and the stop flags, over all ranks. Collective: every rank must call."""
    mine = np.zeros(2 * num_tasks + 4)
    for batch in batches:
        mine[:num_tasks] += batch.targets_per_task(num_tasks).numpy()
        mine[num_tasks : 2 * num_tasks] += batch.samples_per_task(num_tasks).numpy()
        mine[-4] += batch.num_tokens
        mine[-3] += batch.num_truncated
        mine[-2] += batch.input_ids_BS.numel()
    mine[-1] = stop
    everyone = engine.topology.sum(mine)
    tokens, rows = everyone[:num_tasks], everyone[num_tasks : 2 * num_tasks]
    all_tokens, truncated, positions, stops = everyone[2 * num_tasks :].astype(int).tolist()
    return StepCounts(tokens, rows, all_tokens, truncated, positions, bool(stops))


def accumulate(
    engine: Engine,
    context: RoutingContext,
    router_losses: RouterLosses,
    batches: Sequence[Batch],
    counts: StepCounts,
    weights: TokenWeights | None = None,
    look: Callable[[], None] = lambda: None,
    paths: RouterPaths = ONE_PATH,
) -> np.ndarray:
    """Forward and backward over this rank's micro-batches.

    Args:
        engine: Collects the gradients.
        context: Of the engine's layers.
        router_losses: Enter in each backward.
        batches: This rank's, as many as every other rank has.
        counts: Of all ranks.
        weights: Of the target tokens in the global loss; None gives each task its mean per token.
        look: Called between forward and backward of each micro-batch, while it is bound.
        paths: How often each sample runs.

    Returns:
        This rank's sums per task, shape (3, num_tasks): loss, supervised tokens, samples.
    """
    num_tasks = len(counts.tokens_T)
    device = engine.topology.device
    weights = weights or TokenWeights.of("task_token_mean", counts.tokens_T, counts.rows_T, device)
    sums = np.zeros((3, num_tasks))
    on_device = [batch.to(device) for batch in batches]
    repeated = [paths.repeat(batch) for batch in on_device]
    router_losses.begin_step(repeated, counts.all_tokens * paths.number)
    for number, (batch, rows) in enumerate(zip(on_device, repeated, strict=True), start=1):
        with bind_batch(context, rows):
            tokens = paths.choose(token_losses(engine, rows), batch)
            look()
            router_losses.enter()
            loss = (tokens.losses * weights(tokens)).sum()
            engine.backward(loss, last=number == len(on_device))
            sums += task_sums(tokens, batch, num_tasks).numpy()
    return sums


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank): a resumed run needs no generator state."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))
