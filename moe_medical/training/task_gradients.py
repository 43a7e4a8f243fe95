"""Gradients of each task's loss on adapters and routers, and the inner products between tasks.

    batch -> forward -> for each task: backward of its tokens alone -> its row -> sum over ranks -> products

Forward runs through the engine's module and backward through `torch.autograd.grad`, which writes no `.grad`
and wakes none of DeepSpeed's hooks: a step may be under way and is not disturbed. Router losses are nobody's
task and stay out.

Rows are the gradients themselves (tasks x parameters in float32 on each rank), or a count-sketch of them.

Not for every layout: `rules.task_gradient_problems` says which, and why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from moe_medical.adapters.routing import RoutingContext
from moe_medical.data.batches import Batch, collate
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TaskData
from moe_medical.distributed.engine import Engine
from moe_medical.distributed.topology import Topology
from moe_medical.evaluation.loss import TokenLosses, forward_context, token_losses

Weigh = Callable[[TokenLosses], Tensor]
"""Weight of each target token, shape (number of target tokens,)."""


class Sketch:
    """Count-sketch (Charikar et al. 2002): numbers whose inner products estimate those of the gradients.

    Element i is added to bucket h(i) with sign s(i). The sketch is linear, so that it may be summed over
    micro-batches and ranks; an inner product is unbiased with a standard deviation of at most
    |a| |b| sqrt(2 / size), 0.022 |a| |b| at 4096. Buckets and signs take 2 bytes for each element and are the
    same on all ranks and devices.

    Args:
        size: Buckets, at most 16384.
        seed: Of buckets and signs.
    """

    def __init__(self, size: int = 4096, seed: int = 0) -> None:
        self.size = size
        self._seed = seed
        self._places: dict[str, Tensor] = {}

    def __call__(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> gradient, to one tensor of shape (size,)."""
        # Both signs have a bucket of their own at first, which spares a signed copy of the gradient.
        both = torch.zeros(2 * self.size, device=next(iter(gradients.values())).device)
        for name, gradient in gradients.items():
            places = self._places_of(name, gradient)
            both.index_add_(0, places.int(), gradient.flatten().float())
        return {"sketch": both[: self.size] - both[self.size :]}

    def _places_of(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self._places:
            digest = hashlib.sha256(f"sketch:{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            places = torch.randint(2 * self.size, (gradient.numel(),), generator=generator, dtype=torch.int16)
            self._places[name] = places.to(gradient.device)
        return self._places[name]


def task_gram(
    engine: Engine,
    context: RoutingContext,
    batches: Sequence[Batch],
    weigh: Weigh,
    num_tasks: int,
    sketch: Sketch | None = None,
) -> np.ndarray:
    """Inner products of the tasks' gradients, each summed over all micro-batches and ranks.

    Collective: every rank must call, with as many batches as it likes.

    Args:
        engine: Whose trainable parameters count.
        context: Of its layers.
        batches: This rank's micro-batches, on the device.
        weigh: A task's loss is the weighted sum of the losses of its tokens, over all ranks.
        num_tasks: T.
        sketch: Estimate the products in little memory; exact ones without.

    Returns:
        float64, shape (T, T), the same on every rank; zero where a task has no token.
    """
    rows: dict[str, Tensor] = {}
    for name, parameter in engine.named.items() if sketch is None else ():
        rows[name] = torch.zeros(num_tasks, parameter.numel(), device=engine.topology.device)
    if sketch is not None:
        rows["sketch"] = torch.zeros(num_tasks, sketch.size, device=engine.topology.device)
    for batch in batches:
        # One task after the other, so that a single gradient is held beside the sums.
        for task, gradients in _each_task(engine, context, batch, weigh):
            for name, gradient in (sketch(gradients) if sketch else gradients).items():
                rows[name][task] += gradient.flatten()
    return _inner_products(engine, rows, num_tasks)


def probe_batches(
    tasks: Sequence[TaskData], chat: ChatFormat, topology: Topology, done: int, rows: int, micro_batch: int
) -> list[Batch]:
    """This rank's part of training rows of each task, other ones after each number of steps.

    Args:
        tasks: All of the run.
        chat: Token format.
        topology: This process among all.
        done: Steps so far.
        rows: Of each task; a smaller task gives all that it has.
        micro_batch: Rows of a batch at most; a batch has one task only.
    """
    parts = []
    # Drawn, for a multiple of the steps would meet the same rows again in tasks of a round size.
    start = int.from_bytes(hashlib.sha256(f"probe:{done}".encode()).digest()[:7], "little")
    for number, task in enumerate(tasks):
        size = len(task.train)
        chosen = [(start + i) % size for i in range(min(rows, size))]
        parts += [(number, chosen[i : i + micro_batch]) for i in range(0, len(chosen), micro_batch)]
    # Ranks may get different numbers of batches: nothing collective happens in them under these layouts.
    mine = parts[topology.rank :: topology.world_size]
    return [collate(tasks[n].tokens.encoded(part), [n] * len(part), chat.pad_id) for n, part in mine]


def probe_gram(
    engine: Engine,
    context: RoutingContext,
    batches: Sequence[Batch],
    num_tasks: int,
    seed: int,
    sketch: Sketch | None = None,
) -> np.ndarray:
    """Inner products of the gradients of each task's mean loss per target token on probe rows.

    Collective: every rank must call, with its part of the rows. Dropout is that of training, a function of
    `seed`: give another one to each decision and rank.

    Returns:
        float64, shape (T, T): <g_i, g_j>, the same on every rank; zero where no rank has rows of a task.
    """
    device = engine.topology.device
    batches = [batch.to(device) for batch in batches]
    mine = np.zeros(num_tasks)
    for batch in batches:
        mine += batch.targets_per_task(num_tasks).cpu().numpy()
    # The mean over all ranks' tokens of the task, so that a task does not weigh by its number of probe rows.
    tokens = engine.topology.sum(mine)
    each_T = torch.tensor(1 / np.maximum(tokens, 1), dtype=torch.float32, device=device)
    with kept_generators(device):
        torch.manual_seed(seed)
        return task_gram(engine, context, batches, lambda t: each_T[t.task_ids], num_tasks, sketch)


def kept_generators(device: torch.device) -> AbstractContextManager[None]:
    """Context in which random numbers are drawn as they will be drawn again after it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _each_task(
    engine: Engine, context: RoutingContext, batch: Batch, weigh: Weigh
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The tasks of a micro-batch with the gradients of their tokens' weighted losses."""
    parameters = list(engine.named.values())
    with forward_context(context, batch, "gradients"):
        tokens = token_losses(engine.module, batch)
        parts = tokens.losses * weigh(tokens)
        for task in tokens.task_ids.unique().tolist():
            # One graph for all tasks of the micro-batch, so it is kept; experts that no token of the task
            # chose have no gradient at all.
            loss = parts[tokens.task_ids == task].sum()
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            found = zip(engine.named, gradients, strict=True)
            yield task, {name: gradient for name, gradient in found if gradient is not None}


def _inner_products(engine: Engine, rows: dict[str, Tensor], num_tasks: int) -> np.ndarray:
    """Sum the rows over ranks, one parameter after the other, and multiply them."""
    gram = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=engine.topology.device)
    for row_TN in rows.values():
        # Summed before they are multiplied: a product of sums is not the sum of the ranks' products.
        summed = engine.sum(row_TN).double()
        gram += summed @ summed.T
    return gram.cpu().numpy()
