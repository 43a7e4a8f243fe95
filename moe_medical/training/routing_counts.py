"""Which task used which expert in one step: gate mass by layer, task and expert, over all ranks.

    begin -> each micro-batch: forward -> add (inside its `bind`, before backward) -> total

Each token adds its gates, which sum to 1, whatever the number of its experts: where it has one, that counts
choices; where it has several, a choice that the gate makes little of counts little; and a dense gate, which
chooses every expert every time, can be told from another one.

`add` reads what the layers have recorded of this rank's own tokens. Backward may run the forward again, and
the balance loss one in advance; neither is counted. Nothing waits for the device before `total`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_medical.adapters.model import deciding_layers
from moe_medical.adapters.routing import RoutingContext
from moe_medical.distributed.engine import Engine


class RoutingCounts:
    """Counts of one step after the other.

    Args:
        engine: Whose layers are counted.
        context: Of its layers.
        num_tasks: T.

    Attributes:
        layers: Names of the routed layers; none where all adapters are plain, and then there is nothing to
            count.
        experts: Of each of them.
    """

    def __init__(self, engine: Engine, context: RoutingContext, num_tasks: int) -> None:
        routed = deciding_layers(engine.module)
        self.layers: Sequence[str] = list(routed)
        self._engine, self._context = engine, context
        self.experts = [layer.num_experts for layer in routed.values()]
        self._shape = (len(self.layers), num_tasks, max(self.experts, default=0))
        self._mass: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether a step is being counted."""
        return self._mass is not None

    def begin(self) -> None:
        """Start a step at zero."""
        device = self._engine.topology.device
        self._mass = torch.zeros(self._shape, dtype=torch.float64, device=device).flatten()

    @torch.no_grad()
    def add(self) -> None:
        """Count the micro-batch that is bound; call it after its forward and before its backward.

        Raises:
            RuntimeError: no batch with task ids is bound, or `begin` was not called.
        """
        task_ids_BS = self._context.inputs.task_ids_BS
        if task_ids_BS is None or self._mass is None:
            raise RuntimeError("routings are counted between `begin` and `total`, while a batch is bound")
        _, tasks, experts = self._shape
        real_N1 = self._context.inputs.token_mask_T.unsqueeze(1)
        task_N1 = task_ids_BS.reshape(-1, 1)
        for number, name in enumerate(self.layers):
            routing = self._context.record.routings.get(name)
            if routing is not None:
                places_NK = (number * tasks + task_N1) * experts + routing.expert_ids_TK
                self._mass.index_add_(
                    0, places_NK.flatten(), (routing.weights_TK * real_N1).double().flatten()
                )

    def total(self) -> np.ndarray:
        """Sums since `begin` over all ranks; float64, (L, T, E). Collective: every rank must call.

        Raises:
            RuntimeError: `begin` was not called.
        """
        if self._mass is None:
            raise RuntimeError("`total` ends what `begin` has started")
        summed, self._mass = self._engine.sum(self._mass), None
        return np.asarray(summed.cpu().numpy().reshape(self._shape))
