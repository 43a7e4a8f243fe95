"""What the layers are told of a micro-batch while it runs: padding, tasks, samples and their prompts."""

from __future__ import annotations

from contextlib import AbstractContextManager

from moe_medical.adapters.routing import BatchInputs, RoutingContext, Sequences
from moe_medical.data.batches import Batch


def bind_batch(
    context: RoutingContext, batch: Batch, pass_name: str = "train"
) -> AbstractContextManager[RoutingContext]:
    """Bind a micro-batch; must span forward and backward. See `RoutingContext.bind`."""
    return context.bind(BatchInputs(batch.token_mask_BS, batch.task_ids_BS, sequences_of(batch)), pass_name)


def sequences_of(batch: Batch) -> Sequences:
    """The samples of a batch and their prompts."""
    return Sequences.of(batch.position_ids_BS, batch.prompt_mask_BS)
