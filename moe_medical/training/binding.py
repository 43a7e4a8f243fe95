"""What the layers are told of a micro-batch while it runs: padding, tasks, samples and their prompts."""

from __future__ import annotations

from contextlib import AbstractContextManager

from moe_medical.adapters.routing import RoutingContext, Sequences
from moe_medical.data.batches import IGNORE, Batch


def bind_batch(
    context: RoutingContext, batch: Batch, pass_name: str = "train"
) -> AbstractContextManager[RoutingContext]:
    """Bind a micro-batch; must span forward and backward. See `RoutingContext.bind`."""
    prompt_BS = batch.token_mask_BS & (batch.labels_BS == IGNORE)
    sequences = Sequences.of(batch.position_ids_BS, prompt_BS)
    return context.bind(batch.token_mask_BS, batch.task_ids_BS, pass_name, sequences)
