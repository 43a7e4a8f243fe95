"""MING's multi-path loss: each sample goes through the model several times, and its best pass counts.

    rows of a micro-batch --repeat--> n copies of each --forward--> token losses --choose--> those of one pass

Passes differ in what is drawn: experts (`adapters.selection: sample`), jitter, dropout. A sample's loss is
its smallest over the passes, whose gradient alone flows, or their mean.

The passes are rows of one forward pass rather than several of them: n forward passes and one backward would
need n graphs alive as well, but DeepSpeed's ZeRO-3 and the experts' exchange count on one forward for each
backward. To choose without graph and then run what was chosen again cannot be done in one forward either, as
the samples of a micro-batch choose different passes; it would cost 2n forward passes and n backward. So a
micro-batch takes n times the memory: lower `training.micro_batch`, the global batch stays.

The router losses take all passes alike: their tokens, and so the number of them, are n times the data's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moe_medical.data.batches import IGNORE, Batch
from moe_medical.evaluation.loss import TokenLosses


@dataclass(frozen=True)
class RouterPaths:
    """How often each sample runs, and what becomes of its losses."""

    number: int = 1
    reduce: str = "min"
    """`min` or `mean`."""

    def repeat(self, batch: Batch) -> Batch:
        """All rows of a micro-batch, then all of them again, `number` times."""
        if self.number == 1:
            return batch
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        by_row: dict[str, Any] = {
            name: value.repeat(self.number, 1)
            for name, value in values.items()
            if isinstance(value, Tensor) and value.dim() == 2
        }
        return replace(batch, **by_row)

    def choose(self, tokens: TokenLosses, batch: Batch) -> TokenLosses:
        """One loss for each target token of a micro-batch.

        Args:
            tokens: Of the repeated micro-batch.
            batch: The micro-batch itself.
        """
        if self.number == 1:
            return tokens
        losses_PN, *rest = (values.unflatten(0, (self.number, -1)) for values in tokens)
        return TokenLosses(self._reduced(losses_PN, batch), *(values_PN[0] for values_PN in rest))

    def _reduced(self, losses_PN: Tensor, batch: Batch) -> Tensor:
        if self.reduce == "mean":
            return losses_PN.mean(0)
        sample_N = _samples(batch)
        # A batch has fewer samples than positions; to count them would wait for the device.
        sums_PM = losses_PN.new_zeros(self.number, batch.input_ids_BS.numel(), dtype=torch.float64)
        sums_PM.index_add_(1, sample_N, losses_PN.detach().double())
        best_N = sums_PM.argmin(0)[sample_N]
        return losses_PN.gather(0, best_N.unsqueeze(0)).squeeze(0)


ONE_PATH = RouterPaths()


def _samples(batch: Batch) -> Tensor:
    """Number of the sample in the batch that each target token belongs to, in the order of `token_losses`."""
    starts_BS = batch.token_mask_BS & (batch.position_ids_BS == 0)
    sample_BS = starts_BS.flatten().cumsum(0).view_as(starts_BS) - 1
    columns = batch.target_columns_C
    return sample_BS[:, columns][batch.labels_BS[:, columns] != IGNORE]
