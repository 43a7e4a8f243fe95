"""Balance and z-loss of the routers on the statistics of the global batch, padding excluded.

    forward of a micro-batch -> `enter` (choices summed over ranks, handed to the layers) -> backward

The balance loss needs the share of tokens that chose each expert, over all ranks *and* all micro-batches, at
the first backward of the step. With accumulation that takes a forward pass over all micro-batches in advance,
without graph (`balance_over: global_batch`); `micro_batch` takes the shares over the ranks only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_medical.adapters.losses import RoutingSums, router_gradients, routing_sums
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.presets import MoloraConfig
from moe_medical.data.batches import Batch
from moe_medical.distributed.engine import Engine
from moe_medical.evaluation.objective import run_model


class RouterLosses:
    """The router losses of one step after the other.

    Args:
        engine: Whose backward passes the gradients enter.
        context: Carries the layers' routings out and the gradients in.
        adapters: Holds the coefficients.
        balance_over: See `TrainingSection`.
    """

    def __init__(
        self, engine: Engine, context: RoutingContext, adapters: MoloraConfig, balance_over: str
    ) -> None:
        self._engine, self._context, self._over = engine, context, balance_over
        self._balance, self._z = adapters.balance_coefficient, adapters.z_coefficient
        self._tokens = 0
        self._fraction_LE: torch.Tensor | None = None
        self._sums = np.zeros(2)

    @property
    def active(self) -> bool:
        """Whether the run has any router loss."""
        return bool(self._balance or self._z)

    def begin_step(self, batches: Sequence[Batch], all_tokens: int) -> None:
        """Look ahead at this rank's micro-batches where the balance loss needs it.

        Args:
            batches: On the device.
            all_tokens: Of the global step, padding not counted.
        """
        self._tokens, self._fraction_LE, self._sums = all_tokens, None, np.zeros(2)
        if self._balance and self._over == "global_batch" and len(batches) > 1:
            self._fraction_LE = self._shares(self._count(batches))

    def enter(self) -> None:
        """Between forward and backward of a micro-batch, inside its `bind`. Collective."""
        if not self.active or not self._context.routings:
            return
        with torch.no_grad():
            sums = routing_sums(self._context.routings.values(), self._context.token_mask_T)
            fraction_LE = self._shares(sums) if self._fraction_LE is None else self._fraction_LE
            self._add_values(sums, fraction_LE)
        scale = self._engine.gradient_scale / self._tokens
        self._context.router_gradients = router_gradients(
            fraction_LE, self._context.routings, self._balance * scale, self._z * scale
        )

    def values(self) -> dict[str, float]:
        """Balance and z-loss of the last step, without coefficients. Collective."""
        if not self.active:
            return {}
        balance, z = self._engine.topology.sum(self._sums)
        return {"balance": float(balance), "z": float(z)}

    def _count(self, batches: Sequence[Batch]) -> RoutingSums:
        """Routings of all micro-batches, with the dropout that they will have in training."""
        device = self._engine.topology.device
        counted: list[RoutingSums] = []
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in batches:
                with self._context.bind(batch.token_mask_BS, batch.task_ids_BS, "count"):
                    run_model(self._engine.module, batch, batch.target_columns_C[:1])
                    mask_T = self._context.token_mask_T
                    counted.append(routing_sums(self._context.routings.values(), mask_T))
        return RoutingSums(*(sum(column) for column in zip(*counted, strict=True)))

    def _shares(self, sums: RoutingSums) -> torch.Tensor:
        """(L, E): tokens that chose each expert over tokens, of all ranks."""
        both = self._engine.sum(torch.cat([sums.chosen_LE.flatten(), sums.num_tokens.view(1)]))
        return both[:-1].view_as(sums.chosen_LE) / both[-1].clamp(min=1)

    def _add_values(self, sums: RoutingSums, fraction_LE: torch.Tensor) -> None:
        layers, experts = fraction_LE.shape
        balance = experts * (fraction_LE * sums.probs_LE).sum() / (layers * self._tokens)
        z = sums.z_L.sum() / (layers * self._tokens)
        self._sums += torch.stack([balance, z]).double().cpu().numpy()
