"""The language-model loss, task by task.

Default objective (design: per-task token mean): with N_i supervised tokens and n_i samples of task i in
the *global* step, n = sum_i n_i,

    L = sum_i (n_i / n) * (1 / N_i) * sum_{t in task i} loss_t

so that long answers do not drown short ones and the mixture's shares are kept. N_i and n_i are summed
over ranks and accumulation steps before the first backward, so the loss does not depend on either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from moe_medical.data.batches import IGNORE, Batch

Forward = Callable[..., Any]
"""A causal LM, or an engine around one."""


@dataclass(frozen=True)
class TaskSums:
    """Sums of one batch over its tasks, each of shape (num_tasks,)."""

    loss: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor

    def numpy(self) -> np.ndarray:
        """Shape (3, num_tasks), float64: loss, tokens, rows."""
        return torch.stack([self.loss.double(), self.tokens.double(), self.rows.double()]).cpu().numpy()


class TokenLosses(NamedTuple):
    """One entry for each target token of a batch."""

    losses: torch.Tensor
    """float32 cross-entropies, nats."""
    task_ids: torch.Tensor
    sample_targets: torch.Tensor
    """Target tokens of the token's sample."""


def token_losses(forward: Forward, batch: Batch) -> TokenLosses:
    """Cross-entropy of each target token; only columns before a target go through the language-model head."""
    columns = batch.target_columns_C
    logits = run_model(forward, batch, logits_to_keep=columns - 1)
    labels = batch.labels_BS[:, columns]
    supervised = labels != IGNORE
    losses = F.cross_entropy(logits[supervised].float(), labels[supervised], reduction="none")
    task_ids, targets = batch.task_ids_BS[:, columns], batch.sample_targets_BS[:, columns]
    return TokenLosses(losses, task_ids[supervised], targets[supervised])


def run_model(forward: Forward, batch: Batch, logits_to_keep: torch.Tensor) -> torch.Tensor:
    """Logits of the columns `logits_to_keep`, shape (B, columns, vocabulary)."""
    logits: torch.Tensor = forward(
        input_ids=batch.input_ids_BS,
        # With a mask, transformers would not look for samples that start again in the positions.
        attention_mask=None if batch.packed else batch.token_mask_BS,
        position_ids=batch.position_ids_BS,
        use_cache=False,
        logits_to_keep=logits_to_keep,
    ).logits
    return logits


def task_sums(tokens: TokenLosses, batch: Batch, num_tasks: int) -> TaskSums:
    """Per-task sums of detached token losses."""
    total = torch.zeros(num_tasks, dtype=torch.float64, device=tokens.losses.device)
    total.index_add_(0, tokens.task_ids, tokens.losses.detach().double())
    return TaskSums(total, batch.targets_per_task(num_tasks), batch.samples_per_task(num_tasks))


def token_weights(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Weight of one token of each task in the global objective, n_i / (n N_i); 0 for absent tasks.

    Args:
        tokens: supervised tokens N_i of the global step, shape (num_tasks,).
        rows: samples n_i of the global step, shape (num_tasks,).
    """
    present = tokens > 0
    weights = np.zeros(len(tokens))
    weights[present] = rows[present] / (rows.sum() * tokens[present])
    return weights
