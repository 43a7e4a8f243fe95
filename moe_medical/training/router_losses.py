"""The losses of the routers on the statistics of the global batch, padding excluded.

    forward of a micro-batch -> `enter`: statistics summed over ranks, gradients to the layers -> backward

Balance, divergence and localized balance need sums over the tokens of all ranks *and* all micro-batches at
the first backward of the step. With accumulation that takes a forward pass over all micro-batches in advance,
without graph (`balance_over: global_batch`); `micro_batch` takes the sums over the ranks only, and a step's
loss is the mean over its micro-batches, weighted by their tokens. Z-loss and entropy need neither.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_medical.adapters.loss_weights import LossWeights, kinds_of_tasks
from moe_medical.adapters.losses import RoutingSums, router_gradients, routing_sums
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.adapters import MoloraConfig
from moe_medical.data.batches import Batch
from moe_medical.distributed.engine import Engine
from moe_medical.evaluation.loss import forward_context, run_model


class RouterLosses:
    """The router losses of one step after the other.

    Args:
        engine: Whose backward passes the gradients enter.
        context: Carries the layers' routings out and the gradients in.
        adapters: Holds the coefficients.
        balance_over: See `TrainingSection`.
        tasks: Names in the order of the task ids; the localized loss tells two kinds of them apart.

    Raises:
        ConfigError: The localized loss is active and names unknown tasks, or leaves a kind without any.
    """

    def __init__(
        self,
        engine: Engine,
        context: RoutingContext,
        adapters: MoloraConfig,
        balance_over: str,
        tasks: Sequence[str] = (),
    ) -> None:
        self._engine = engine
        self._context = context
        self._over = balance_over
        self._weights = LossWeights.of(adapters)
        self._class_of_J: Tensor | None = None
        if self._weights.localized:
            kinds = kinds_of_tasks(adapters, tasks)
            self._class_of_J = torch.tensor(kinds, device=engine.topology.device)
        self._tokens = 0
        self._ahead: RoutingSums | None = None
        self._seen: list[RoutingSums] = []

    @property
    def active(self) -> bool:
        """Whether the run has any router loss."""
        return bool(self._weights.active)

    def begin_step(self, batches: Sequence[Batch], all_tokens: int) -> None:
        """Look ahead at this rank's micro-batches where a loss needs it.

        Args:
            batches: On the device.
            all_tokens: Of the global step, padding not counted.
        """
        self._tokens = all_tokens
        self._ahead = None
        self._seen = []
        # With one micro-batch its own forward has all that the statistics need, before its backward begins.
        if self._weights.needs_statistics and self._over == "global_batch" and len(batches) > 1:
            self._ahead = self._count(batches)
            self._seen = [] if self._ahead is None else [self._ahead]

    @torch.no_grad()
    def enter(self) -> None:
        """Between forward and backward of a micro-batch, inside its `bind`. Collective."""
        if not self.active or not self._context.record.routings:
            return
        # Where nothing was counted ahead, the statistics are those of this micro-batch on all ranks.
        if self._ahead is None:
            self._seen.append(
                self._over_ranks(self._sums()) if self._weights.needs_statistics else self._sums()
            )
        self._context.record.gradients = router_gradients(
            self._ahead or self._seen[-1],
            self._context.record.routings,
            self._weights,
            self._engine.gradient_scale / self._tokens,
            self._classes_T,
        )

    def values(self) -> dict[str, float]:
        """The active losses of the last step, without coefficients. Collective."""
        if not self._seen:
            return {}
        seen = self._seen
        if not self._weights.needs_statistics:
            seen = [self._over_ranks(_added(seen))]
        values = dict.fromkeys(self._weights.active, 0.0)
        # Micro-batches count by their tokens, so that the value is that of the global step.
        for sums in seen:
            share = float(sums.num_tokens) / self._tokens
            for name, value in sums.values(self._weights).items():
                values[name] += share * float(value)
        return values

    def _count(self, batches: Sequence[Batch]) -> RoutingSums | None:
        """Routings of all ranks' micro-batches, with the randomness that they will have in training."""
        device = self._engine.topology.device
        counted: list[RoutingSums] = []
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in batches:
                with forward_context(self._context, batch, "count"):
                    # One column of logits: the head's work is not needed, the layers' routing is.
                    run_model(self._engine.module, batch, batch.target_columns_C[:1])
                    if self._context.record.routings:
                        counted.append(self._sums())
        return self._over_ranks(_added(counted)) if counted else None

    def _sums(self) -> RoutingSums:
        """Of the bound micro-batch."""
        routings = self._context.record.routings.values()
        mask_T = self._context.inputs.token_mask_T
        return routing_sums(routings, mask_T, self._classes_T, self._weights.classes)

    def _over_ranks(self, sums: RoutingSums) -> RoutingSums:
        return sums.through(self._engine.sum)

    @property
    def _classes_T(self) -> Tensor | None:
        """Class of each token of the bound micro-batch; None where there is one only."""
        if self._class_of_J is None:
            return None
        if self._context.inputs.task_ids_BS is None:
            raise RuntimeError("the localized loss needs the task of each token: bind them")
        return self._class_of_J[self._context.inputs.task_ids_BS.reshape(-1)]


def _added(sums: Sequence[RoutingSums]) -> RoutingSums:
    return functools.reduce(operator.add, sums)
